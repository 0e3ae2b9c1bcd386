"""`compile`: the train step built for machines that are not here, and whether it fits them."""

import dataclasses
import math
import os
import time
from typing import Any

import jax

from jaxscale.launch import tpu
from jaxscale.launch.ahead_of_time import (
    Memory,
    as_on,
    compile_with_host,
    described_devices,
    device_memory_bytes,
    memory_of,
)
from jaxscale.launch.collectives import KINDS, Collective, collectives
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.ops.device import name_kernels
from jaxscale.ops.tuned import log_tuned, use_tuned
from jaxscale.run.pretrain import run_batch
from jaxscale.run.run import Run
from jaxscale.train.setup import Setup
from jaxscale.train.state import rests_on_host
from jaxscale.train.step import make_step
from jaxscale.types import Batch, InputError, RunError

SHARE_VARIABLE, DEFAULT_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"
LARGEST_SHARE = 0.95  # the rest is for CUDA itself and NCCL's buffers


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many hosts of a described machine with so many GPUs each, or a grid of TPU chips."""

    machine: str
    sizes: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """From text such as "h200:16x8" or "v5p:2x2x4"; raises InputError for another form."""
        machine, _, grid = text.partition(":")
        num_sizes = (2, 3) if machine in tpu.MEMORY_BYTES else (2,)
        sizes = grid.split("x")
        if len(sizes) not in num_sizes or not all(size.isdecimal() for size in sizes):
            expected = 'MACHINE:HOSTSxGPUS_PER_HOST, such as "h200:16x8", or a TPU\'s, "v5e:2x4"'
            raise InputError("topology", text, expected)
        return cls(machine, tuple(map(int, sizes)))

    def devices(self) -> list[jax.Device]:
        """Its devices, to compile for."""
        if self.machine in tpu.MEMORY_BYTES:
            grid = "x".join(map(str, self.sizes))
            return tpu.described_chips(f"{self.machine}:{grid}")
        num_hosts, gpus_per_host = self.sizes
        return described_devices(self.machine, num_hosts=num_hosts, gpus_per_host=gpus_per_host)

    def memory_bytes(self) -> int:
        """Of one device."""
        known = tpu.MEMORY_BYTES.get(self.machine)
        return known or device_memory_bytes(self.machine)

    def share(self) -> float:
        """The share of it that JAX takes; of a TPU's it is all."""
        return 1.0 if self.machine in tpu.MEMORY_BYTES else memory_share()


def compile_step(*, run: Run, topology: str) -> None:
    """Compiles the step that `pretrain` would run; prints memory, collectives and compile time.

    Nothing is allocated, no data is read and no GPU is needed. Left out is what the compiler cannot
    know without a GPU: cuDNN's workspaces, NCCL's buffers, and the matmul kernels that tuning would
    choose.

    Args:
        run: the run.
        topology: such as "h200:16x8", 16 hosts of 8, or "v5e:2x4", a grid of TPU chips.
    Raises:
        InputError: the parts do not fit one another or the topology, or the compiler is missing.
        RunError: the step does not fit into the devices' memory, or the compiler failed.
    """
    wanted = Topology.parse(topology)
    share = wanted.share()
    apply_for_compiling(run.runtime)
    devices, began = wanted.devices(), time.perf_counter()
    step = lower_step(run, devices)
    log_tuned()
    traced = time.perf_counter()
    compiled = step.compile()
    seconds = time.perf_counter() - traced
    memory, available = memory_of(compiled), wanted.memory_bytes()
    print(f"{topology}: {len(devices)} x {devices[0].device_kind}")
    print(f"traced in {traced - began:.1f} s, compiled in {seconds:.1f} s\n")
    print(_memory_text(memory, step.setup, step.batch, available))
    print(_collectives_text(collectives(compiled.as_text())))
    print(f"\n{check_fits(memory.peak, available, share)}")


def apply_for_compiling(runtime: RuntimeConfig) -> None:
    """Applies to this process what a run's settings change in programs for devices elsewhere.

    The flag of a deterministic run stays out: it asks for tuning on a GPU, without which a default
    will do.
    """
    apply_runtime(RuntimeConfig(platform="cpu", xla_flags=runtime.xla_flags), ".")
    name_kernels(runtime.kernels)
    use_tuned(runtime.block_sizes)


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """A run's step, traced for devices that are only described."""

    setup: Setup
    batch: Batch
    lowered: jax.stages.Lowered

    def compile(self) -> jax.stages.Compiled:
        """Compiles the step; raises RunError if the compiler fails."""
        setup = self.setup
        trainable = setup.region.trainable
        is_on_host = rests_on_host(setup.state, setup.region.specs, trainable)
        return _compile(self.lowered, jax.tree.leaves(is_on_host))


def lower_step(run: Run, devices: list[jax.Device]) -> LoweredStep:
    """The step of a run on described devices; raises InputError if the parts do not fit."""
    with as_on(devices):
        setup = run.setup(devices)
        batch = run_batch(run, setup)
        lowered = make_step(setup).lower(setup.state, batch)
    return LoweredStep(setup, batch, lowered)


def memory_share() -> float:
    """The share of a GPU's memory that JAX takes at its start, by this process's environment."""
    text = os.environ.get(SHARE_VARIABLE, DEFAULT_SHARE)
    try:
        return float(text)
    except ValueError:
        raise InputError(SHARE_VARIABLE, text, "a number above 0 and at most 1") from None


def check_fits(
    peak: int,
    available: int,
    share: float,
) -> str:
    """Says that `peak` bytes fit into JAX's share of `available`; raises RunError if not."""
    limit = f"JAX takes {share:g} of {_gib(available)} = {_gib(available * share)}"
    if peak <= available * share:
        return f"fits: {_gib(peak)} needed; {limit}"
    if peak <= available * LARGEST_SHARE:
        limit += f"; {SHARE_VARIABLE}={math.ceil(peak / available * 100) / 100:.2f} would do"
    raise RunError(f"does not fit: {_gib(peak)} needed; {limit}")


def _compile(lowered: jax.stages.Lowered, is_on_host: list[bool]) -> jax.stages.Compiled:
    """Compiles the step; `is_on_host` is for each leaf of its first argument and result."""
    try:
        if any(is_on_host):
            return compile_with_host(lowered, arguments=is_on_host, results=is_on_host)
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        # As the compiler for TPUs says, which knows their memory.
        is_too_large = reason.startswith("RESOURCE_EXHAUSTED")
        what = "does not fit" if is_too_large else "the compiler failed, maybe for want of a GPU"
        raise RunError(f"{what}: {reason}") from error


def _memory_text(
    memory: Memory,
    setup: Setup,
    batch: Batch,
    available: int,
) -> str:
    rows = {
        "parameters": bytes_per_device(setup.state.params),
        "optimizer state": bytes_per_device(setup.state.opt_state),
        "batch": bytes_per_device(batch),
        "arguments, all": memory.arguments,
        "outputs, new": memory.outputs,
        "temporaries": memory.temporaries,
        "peak": memory.peak,
        "device memory": available,
    }
    rows |= {"host memory": memory.host} if memory.host else {}
    return "bytes per device\n" + "".join(
        f"  {name:<18} {_gib(size)} {size:>17,}\n" for name, size in rows.items()
    )


def bytes_per_device(abstract: Any) -> int:
    """Bytes that one device has of arrays that are given as shapes with shardings."""
    leaves = jax.tree.leaves(abstract)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def _collectives_text(found: list[Collective]) -> str:
    if not found:
        return "no collectives"
    lines = [
        "collectives of one step, on each device (loops multiplied out, of branches the one that "
        "sends most)",
        f"  {'kind':<18} {'in the program':>14} {'run':>8} {'GiB delivered':>13} "
        f"{'largest, bytes':>17}",
    ]
    for kind in (kind for kind in KINDS if any(each.kind == kind for each in found)):
        ours = [each for each in found if each.kind == kind]
        total, largest = sum(c.num_bytes * c.times for c in ours), max(c.num_bytes for c in ours)
        note = (
            ""
            if all(c.is_exact for c in ours)
            else "  some in a loop of unknown length, counted once"
        )
        runs = sum(c.times for c in ours)
        lines.append(
            f"  {kind:<18} {len(ours):>14} {runs:>8,} {total / 2**30:>13.3f} {largest:>17,}{note}"
        )
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
