"""What must be set before JAX first touches a device: platform, devices, flags, processes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax

from jaxscale.launch.memory import GIB, pinnable_bytes
from jaxscale.launch.plugins import shorten_errors
from jaxscale.launch.processes import (
    ProcessesConfig,
    first_process_says,
    process_index,
    start_processes,
)
from jaxscale.ops.device import FAMILIES, kernel_family, name_kernels
from jaxscale.ops.tuned import log_tuned, use_tuned
from jaxscale.types import InputError, check_choice, check_positive, check_types

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # what a GPU may pin, in GiB; 64 by default
MAX_CPU_DEVICES = 1024
DEFAULT_WATCHDOG_S = 300  # where several processes wait for one another


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """Settings of the process.

    Args:
        platform: "cpu", "cuda" or "tpu"; None leaves the choice to JAX.
        num_cpu_devices: virtual devices that a CPU is split into; None for JAX's default.
        is_deterministic: same bits from the same run on a GPU: deterministic operations, and the
            autotuner's choices kept in the run's directory, which all processes share, and used
            again on resume.
        xla_flags: further XLA flags, such as "--xla_gpu_enable_triton_gemm=false".
        kernels: whose kernels compute: "mosaic" (Hopper GPUs), "triton" (GPUs since Ampere) or
            "xla" (none of ours); None takes the device's fastest and logs it.
        block_sizes: a file that `jaxscale tune` wrote on this kind of device, for the Triton
            kernels; None takes the package's own.
        processes: how the run's processes find one another; None for a run of one process.
        watchdog_timeout_s: a step that takes longer ends the process, see `launch.watchdog`; a
            process that is dead or frozen ends the others within twice that, whatever they do.
            None: DEFAULT_WATCHDOG_S with several processes, no watch in a run of one, which waits
            for nobody.
    """

    platform: str | None = None
    num_cpu_devices: int | None = None
    is_deterministic: bool = False
    xla_flags: tuple[str, ...] = ()
    kernels: str | None = None
    block_sizes: str | None = None
    processes: ProcessesConfig | None = None
    watchdog_timeout_s: int | None = None

    def __post_init__(self):
        check_types(self)
        check_choice("RuntimeConfig.platform", self.platform, (None, "cpu", "cuda", "tpu"))
        check_choice("RuntimeConfig.kernels", self.kernels, (None, *FAMILIES))
        if self.num_cpu_devices is not None:
            check_positive("RuntimeConfig.num_cpu_devices", self.num_cpu_devices)
            if self.num_cpu_devices > MAX_CPU_DEVICES:
                expected = f"at most {MAX_CPU_DEVICES}: each has threads of its own"
                raise InputError("RuntimeConfig.num_cpu_devices", self.num_cpu_devices, expected)
        for flag in self.xla_flags:
            if not flag.startswith("--xla_"):
                raise InputError("RuntimeConfig.xla_flags", flag, "flags that begin with --xla_")
        if self.watchdog_timeout_s is not None:
            check_positive("RuntimeConfig.watchdog_timeout_s", self.watchdog_timeout_s)

    def watchdog_s(self, num_processes: int) -> int | None:
        """Seconds that a step may take in a run of so many processes; None for ever."""
        return self.watchdog_timeout_s or (DEFAULT_WATCHDOG_S if num_processes > 1 else None)


def apply_runtime(config: RuntimeConfig, directory: str) -> None:
    """Applies the settings to this process.

    Args:
        config: the settings.
        directory: of the run; holds the saved autotuning of a deterministic run.
    Raises:
        InputError: this machine has no such platform, JAX has already started with other devices or
            flags than the configuration asks for, its devices cannot run the kernels or are not
            those of the block sizes, or a launcher's variable is missing.
        RunError: this process could not join the others.
    """
    shorten_errors()
    _set_flags("RuntimeConfig.xla_flags", config.xla_flags, by_user=True)
    if there := pinnable_bytes():
        os.environ.setdefault(PINNED_LIMIT, str(max(there // GIB, 1)))
    name_kernels(config.kernels)
    use_tuned(config.block_sizes)
    if config.platform is not None:
        jax.config.update("jax_platforms", config.platform)
    if config.num_cpu_devices is not None:
        _set_cpu_devices(config.num_cpu_devices)
    if config.processes is not None:
        # JAX's own timeout comes later than the watchdog's, whose message says more.
        watchdog_s = config.watchdog_timeout_s or DEFAULT_WATCHDOG_S
        start_processes(config.processes, heartbeat_timeout_s=2 * watchdog_s)
    if config.is_deterministic:
        flags = ("--xla_gpu_deterministic_ops=true", *_autotune_flags(directory))
        _set_flags("RuntimeConfig.is_deterministic", flags)
    if config.platform is not None:
        _check_platform(config.platform)
    if config.kernels is not None or config.block_sizes is not None:
        kernel_family()
    log_tuned()


def _autotune_flags(directory: str) -> tuple[str, ...]:
    """Flags that load the autotuner's choices in every process, or have process 0 save them.

    The others need not save: XLA has each process tune a share and gives all of them every choice.
    For that they wait for one another, so all must load or none. Process 0 says which, whatever
    another process's file system shows by now.
    """
    saved = Path(directory, "autotune.txtpb").absolute()
    # A run that failed to compile leaves an empty file.
    is_saved = saved.exists() and saved.stat().st_size > 0
    action = "load" if is_saved else "dump"
    if first_process_says("autotune", action) == "load":
        return (f"--xla_gpu_load_autotune_results_from={saved}",)
    return (f"--xla_gpu_dump_autotune_results_to={saved}",) if process_index() == 0 else ()


def _check_flags(flags: list[str]) -> None:
    """Raises InputError for a flag that XLA does not know, at which it would end this process."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    tried = subprocess.run(program, env=environment, capture_output=True, text=True)
    if tried.returncode:
        reason = tried.stderr.strip().splitlines()[-1].rpartition("] ")[2]
        raise InputError("RuntimeConfig.xla_flags", flags, f"flags of this XLA ({reason})")


def _set_flags(parameter: str, flags: tuple[str, ...], *, by_user: bool = False) -> None:
    """Adds flags to those of the environment; XLA reads them once, when it starts."""
    present = os.environ.get("XLA_FLAGS", "").split()
    missing = [flag for flag in flags if flag not in present]
    if missing and _has_started():
        expected = f"a process of its own: this one has started, without {' '.join(missing)}"
        raise InputError(parameter, flags, expected)
    if missing and by_user:
        _check_flags(missing)
    os.environ["XLA_FLAGS"] = " ".join(present + missing)


def _has_started() -> bool:
    """Whether JAX has started its devices.

    JAX cannot be asked, but once they have started it refuses another number of devices.
    """
    number = jax.config.jax_num_cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", max(number, 0) + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", number)
    return False


def _check_platform(platform: str) -> None:
    try:
        started = jax.devices()[0].platform.replace("gpu", "cuda")
    except (RuntimeError, AssertionError) as error:
        # JAX fails an assertion, without a message, where a plugin finds no device.
        reason = str(error).partition("\n")[0] or "no device"
        expected = f"a platform that this machine and this installation of JAX have ({reason})"
        raise InputError("RuntimeConfig.platform", platform, expected) from None
    if started != platform:
        expected = f"{started!r}, as this process has started with"
        raise InputError("RuntimeConfig.platform", platform, expected)


def _set_cpu_devices(number: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        # The devices have started, which is fine if they are as many as wanted.
        started = len(jax.devices("cpu"))
        if started != number:
            expected = f"{started}, as this process has started with"
            raise InputError("RuntimeConfig.num_cpu_devices", number, expected) from None
