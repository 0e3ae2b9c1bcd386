"""Starts JAX in every process of a run, which a launcher such as srun or mpirun has started."""

import dataclasses
import faulthandler
import importlib.util
import os
import socket
import threading
from typing import Any, NamedTuple

import jax

# Private to JAX: its public functions that say a process's index start the devices.
from jax._src import distributed

from jaxscale.types import InputError, RunError, check_choice, check_positive, check_types

EXIT_FAILED = 1  # the exit status of a failed command
GRACE_S = 60  # after our own timer JAX's must not come first: it aborts without our message
SAYING_TIMEOUT_MS = 60_000  # for the others to ask process 0; all have joined by then
ADDRESS_VARIABLE = "JAX_COORDINATOR_ADDRESS"  # JAX's own name for it


class Launcher(NamedTuple):
    """How a launcher tells a process who it is.

    Args:
        number, index, local_index: environment variables with the number of processes, this
            process's index, and its index on its host; None where the launcher does not tell.
        others: further variables that must be set.
        detection: JAX's name for the method that finds the coordinator.
    """

    number: str | None = None
    index: str | None = None
    local_index: str | None = None
    others: tuple[str, ...] = ()
    detection: str = "deactivate"


LAUNCHERS = {
    "explicit": Launcher(),
    "slurm": Launcher(
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST"),
        "slurm",
    ),
    "openmpi": Launcher(
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", (), "ompi"
    ),
    "mpi": Launcher(detection="mpi4py"),
    "kubernetes": Launcher("NUM_PROCESSES", "JOB_COMPLETION_INDEX"),
}
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # from Open MPI 5 on the launcher no longer says where it runs


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """How the processes of a run find one another.

    For what is None here the launcher's variables are read.

    Args:
        launcher: "slurm" (srun), "openmpi" (mpirun), "mpi" (any other MPI, through the package
            mpi4py), "kubernetes" (an indexed Job with $NUM_PROCESSES) or "explicit".
        coordinator: "host:port" of process 0, as the others reach it; None:
            $JAX_COORDINATOR_ADDRESS, else what JAX finds out by Slurm or MPI.
        number: of processes.
        index: of this process, from 0.
        gpus_per_process: under Slurm and Open MPI, where the process of rank r on its host takes
            GPUs [r * n, (r + 1) * n) or, where it sees but n, those, None for n = 1; the other
            launchers' processes take every GPU that they see.
        start_timeout_s: how long to wait until all are there.
    """

    launcher: str
    coordinator: str | None = None
    number: int | None = None
    index: int | None = None
    gpus_per_process: int | None = None
    start_timeout_s: int = 300

    def __post_init__(self):
        check_types(self)
        check_choice("ProcessesConfig.launcher", self.launcher, LAUNCHERS)
        for name in ("number", "gpus_per_process", "start_timeout_s"):
            if getattr(self, name) is not None:
                check_positive(f"ProcessesConfig.{name}", getattr(self, name))
        if self.coordinator is not None:
            _check_address("ProcessesConfig.coordinator", self.coordinator)
        if self.gpus_per_process is not None and LAUNCHERS[self.launcher].local_index is None:
            reason = "this launcher does not number a host's processes"
            expected = f"None: {reason}; set CUDA_VISIBLE_DEVICES for each"
            raise InputError("ProcessesConfig.gpus_per_process", self.gpus_per_process, expected)


def start_processes(config: ProcessesConfig, heartbeat_timeout_s: int) -> None:
    """Joins the run's other processes; does nothing in a process that has joined already.

    When they are not all there in time, this ends the process with a line on stderr and status 1:
    JAX waits outside Python, and would abort.

    Args:
        config: who they are.
        heartbeat_timeout_s: JAX ends every process when one of them has been dead or frozen for so
            long.
    Raises:
        InputError: a variable of the launcher is missing or out of range, or the coordinator's port
            is taken.
        RunError: JAX refused, such as when it has been used before in this process.
    """
    if jax.distributed.is_initialized():
        return
    arguments = start_arguments(config)
    index, number = arguments["process_id"], arguments["num_processes"]
    coordinator = arguments["coordinator_address"]
    if index == 0 and coordinator is not None:
        _check_port(coordinator)
    # JAX's handler would swallow a SIGTERM that comes before training has set its own.
    jax.config.update("jax_enable_preemption_service", False)
    settings = f"launcher {config.launcher!r}, coordinator {coordinator!r}"
    failure = f"process {index} of {number} could not join the run"
    failure = f"{failure} (RuntimeConfig.processes: {settings})"
    reason = "the coordinator cannot be reached or a process is missing"
    message = f"{failure}: {reason} after {config.start_timeout_s} s"
    timer = threading.Timer(config.start_timeout_s, _give_up, (message,))
    timer.start()
    faulthandler.enable()  # JAX aborts when a process is dead: show where this one was
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=config.start_timeout_s + GRACE_S,
            heartbeat_timeout_seconds=heartbeat_timeout_s,
            shutdown_timeout_seconds=heartbeat_timeout_s,
        )
    except (RuntimeError, ValueError, OSError) as error:
        one_line = " ".join(str(error).split())
        raise RunError(f"{failure}: {one_line}") from error
    finally:
        timer.cancel()


def process_index() -> int:
    """This process's index in the run.

    `jax.process_index()` would start the devices, after which no flag counts.
    """
    return distributed.global_state.process_id


def first_process_says(name: str, value: str) -> str:
    """In every process of the run, what process 0 gave for `value`; starts no devices.

    Args:
        name: the same in all processes.
        value: counts in process 0 only.
    """
    client = distributed.global_state.client
    if client is None:
        return value
    if process_index() == 0:
        client.key_value_set(f"jaxscale/{name}", value, allow_overwrite=True)
    return client.blocking_key_value_get(f"jaxscale/{name}", SAYING_TIMEOUT_MS)


def _check_address(parameter: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    is_port = port.isdecimal() and 0 < int(port) < 65536
    if not (host and is_port):
        raise InputError(parameter, address, '"host:port", such as "node1:55527"')


def _check_port(coordinator: str) -> None:
    """Raises InputError where this process cannot listen on the port: JAX would crash."""
    _, _, port = coordinator.rpartition(":")
    address = ("", int(port))
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    try:
        socket.create_server(address, family=family, dualstack_ipv6=is_dual).close()
    except OSError as error:
        expected = f"a port on which process 0 can listen ({os.strerror(error.errno)})"
        raise InputError("RuntimeConfig.processes.coordinator", coordinator, expected) from None


def _give_up(message: str) -> None:
    os.write(2, f"jaxscale: {message}\n".encode())
    os._exit(EXIT_FAILED)


def start_arguments(config: ProcessesConfig) -> dict[str, Any]:
    """What `jax.distributed.initialize` is called with.

    None stands only for what JAX's own detection finds.

    Raises:
        InputError: as `start_processes`.
    """
    launcher = LAUNCHERS[config.launcher]
    coordinator = config.coordinator or os.environ.get(ADDRESS_VARIABLE)
    if coordinator is not None:
        _check_address(f"environment variable {ADDRESS_VARIABLE}", coordinator)
    if coordinator is None:
        for name in launcher.others:
            _variable(config, name)
    number = _given_or_variable(config, "number", launcher.number)
    index = _given_or_variable(config, "index", launcher.index)
    if config.launcher != "mpi" and not 0 <= index < number:
        expected = f"0 <= index < number of processes = {number}"
        raise InputError("RuntimeConfig.processes.index", index, expected)
    return {
        "coordinator_address": coordinator,
        "num_processes": number,
        "process_id": index,
        "local_device_ids": _local_devices(config, launcher),
        "cluster_detection_method": _detection(config, launcher, coordinator),
    }


def _detection(
    config: ProcessesConfig,
    launcher: Launcher,
    coordinator: str | None,
) -> str:
    """JAX's name for the method that finds what is not known yet."""
    if coordinator is not None and config.launcher != "mpi":
        return "deactivate"
    if launcher.detection == "deactivate":
        expected = f'"host:port" of process 0, here or in ${ADDRESS_VARIABLE}'
        raise InputError("RuntimeConfig.processes.coordinator", None, expected)
    if config.launcher == "slurm" or OPEN_MPI_4 in os.environ:
        return launcher.detection
    if importlib.util.find_spec("mpi4py") is None:
        expected = '"host:port" of process 0, or the package mpi4py, which finds it'
        raise InputError("RuntimeConfig.processes.coordinator", coordinator, expected)
    return "mpi4py"


def _local_devices(config: ProcessesConfig, launcher: Launcher) -> list[int] | None:
    """Numbers of the GPUs that this process takes; None for all that it sees, or for JAX to say.

    A launcher that gives each process GPUs of its own, as `srun --gpus-per-task` does, shows it no
    others, and they are numbered from 0.
    """
    if launcher.local_index is None:
        return None
    count = config.gpus_per_process or 1
    first = _variable(config, launcher.local_index, is_number=True) * count
    visible = os.environ.get(VISIBLE_VARIABLE, "")
    if len(visible.split(",")) == count and visible.strip():
        first = 0
    return list(range(first, first + count))


def _given_or_variable(
    config: ProcessesConfig,
    field: str,
    variable: str | None,
) -> int | None:
    given = getattr(config, field)
    if given is not None or config.launcher == "mpi":
        return given
    if variable is None:
        expected = 'a number, as launcher is "explicit"'
        raise InputError(f"RuntimeConfig.processes.{field}", None, expected)
    return _variable(config, variable, is_number=True)


def _variable(
    config: ProcessesConfig,
    name: str,
    *,
    is_number: bool = False,
) -> Any:
    value = os.environ.get(name)
    if value is None or (is_number and not value.isdecimal()):
        kind = "a number" if is_number else "a value"
        reason = f"which launcher {config.launcher!r} sets in every process that it starts"
        expected = f"{kind}, {reason}"
        raise InputError(f"environment variable {name}", value, expected)
    return int(value) if is_number else value
