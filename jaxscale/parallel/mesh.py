"""The five mesh axes as one validated configuration."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxscale.types import InputError, check_choice, check_positive, check_types

AXES = ("pipeline", "data", "expert", "sequence", "tensor")
PIPELINE, DATA, EXPERT, SEQUENCE, TENSOR = AXES
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
# [B, T]: dense layers shard the batch over `data` and `expert`.
BATCH_SPEC = PartitionSpec((DATA, EXPERT), SEQUENCE)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the axes, outermost on the slowest link, and how each axis is used.

    Args:
        pipeline: stages of the layer stack.
        data: replicas of the model, over which ZeRO shards.
        expert: shares of the experts; dense layers use it as more data.
        sequence: shares of the sequence.
        tensor: shares of heads, feed-forward, experts' width and vocabulary.
        zero: what is sharded over `zero_axes` (arXiv 1910.02054, section 5): 0 nothing, 1 the
            optimizer state, 2 also the gradients, 3 also the parameters. Gradients add up unsharded
            over the micro-batches and are sharded once, at the end of the step; under 3 those of
            each micro-batch are sharded. Under 3 without rematerialisation every layer keeps its
            gathered parameters for the backward: they are gathered once, and take the memory of the
            whole model in the compute type.
        zero_axes: ("data",) or ("data", "sequence"): both hold replicas of the parameters.
        ring: of the `sequence` shares, rings of so many pass keys round (arXiv 2310.01889); the
            sequence / ring members of a group exchange heads (arXiv 2309.14509).
        schedule: of the pipeline, one of SCHEDULES.
        num_chunks: chunks of the stack that each stage holds, above 1 for "interleaved".
        stage_periods: periods of the stack in each chunk, in the order of the layers; None is as
            even as possible.
        expert_axis: "expert" exchanges tokens; "tensor" holds whole experts on each tensor rank,
            which sees all its group's tokens already (arXiv 2409.12136, section 3.2).
        is_optimizer_on_host: the optimizer's moments rest in host memory between updates. A step
            moves them to the device and back, an eighth or one parameter's at a time.
        is_elastic: a training that finds fewer devices than the axes ask for goes on with fewer
            data ranks and more micro-batches, see `parallel.elastic`.
    """

    pipeline: int = 1
    data: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    zero: int = 1
    zero_axes: tuple[str, ...] = (DATA, SEQUENCE)
    ring: int = 1
    schedule: str = "1f1b"
    num_chunks: int = 1
    stage_periods: tuple[int, ...] | None = None
    expert_axis: str = EXPERT
    is_optimizer_on_host: bool = False
    is_elastic: bool = False

    def __post_init__(self):
        check_types(self)
        for name in (*AXES, "ring", "num_chunks"):
            check_positive(f"MeshConfig.{name}", getattr(self, name))
        if self.zero not in (0, 1, 2, 3):
            raise InputError("MeshConfig.zero", self.zero, "0, 1, 2 or 3")
        check_choice("MeshConfig.zero_axes", self.zero_axes, ((DATA,), (DATA, SEQUENCE)))
        check_choice("MeshConfig.schedule", self.schedule, SCHEDULES)
        check_choice("MeshConfig.expert_axis", self.expert_axis, (EXPERT, TENSOR))
        if rest := self.sequence % self.ring:
            equation = f"sequence % ring == 0, but {self.sequence} % {self.ring} = {rest}"
            nearest = nearest_divisors(self.sequence, self.ring)
            raise InputError("MeshConfig.ring", self.ring, f"{equation}; nearest: {nearest}")
        if self.num_chunks > 1 and self.schedule != "interleaved":
            expected = '1 unless schedule is "interleaved"'
            raise InputError("MeshConfig.num_chunks", self.num_chunks, expected)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Axis sizes in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def num_batch_shards(self) -> int:
        """Shares of the batch: data * expert."""
        return self.data * self.expert


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh.

    Args:
        config: axis sizes.
        devices: defaults to all of `jax.devices()`.
    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    if devices is None:
        devices = jax.devices()
    product = math.prod(config.sizes)
    if product != len(devices):
        names = " * ".join(AXES)
        numbers = " * ".join(map(str, config.sizes))
        equation = f"{names} = {numbers} = {product} to equal the number of devices, {len(devices)}"
        nearest = _fitting(config, len(devices))
        raise InputError("MeshConfig", config.sizes, f"{equation}; nearest: {nearest}")
    grid = np.asarray(devices).reshape(config.sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(
    config: MeshConfig,
    *,
    batch_size: int,
    length: int,
    num_microbatches: int,
) -> None:
    """Raises InputError unless [batch_size, length] divides over the mesh and the micro-batches."""
    check_multiple(
        "DataConfig.batch_size",
        batch_size,
        config.num_batch_shards * num_microbatches,
        "batch_size % (data * expert * num_microbatches)",
        f"({config.data} * {config.expert} * {num_microbatches})",
    )
    check_multiple(
        "DataConfig.sequence_length",
        length,
        config.sequence * config.tensor,
        "sequence_length % (sequence * tensor)",
        f"({config.sequence} * {config.tensor})",
    )
    if config.ring > 1:
        check_multiple(
            "DataConfig.sequence_length",
            length,
            2 * config.ring,
            "sequence_length % (2 * ring)",
            f"(2 * {config.ring})",
        )


def check_multiple(
    parameter: str,
    given: int,
    factor: int,
    remainder: str,
    factor_text: str,
) -> None:
    """Raises InputError unless `given` is a multiple of `factor`.

    Args:
        parameter: dotted name of what was given.
        given: the number.
        factor: what must divide it.
        remainder: the left side of the equation in names, such as "length % (2 * ring)".
        factor_text: the factor as the user's numbers make it, such as "(2 * 4)".
    """
    if rest := given % factor:
        here = f"here {given} % {factor_text} = {rest}"
        nearest = nearest_multiples(given, factor)
        raise InputError(parameter, given, f"{remainder} == 0, {here}; nearest: {nearest}")


def nearest_divisors(size: int, given: int) -> str:
    """The divisors of `size` next below and above `given`, as text."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    below = [number for number in divisors if number <= given][-1:]
    above = [number for number in divisors if number > given][:1]
    return " or ".join(map(str, below + above))


def nearest_multiples(given: int, factor: int) -> str:
    """The positive multiples of `factor` next below and above `given`, as text."""
    below = given - given % factor
    above = below + factor
    return " or ".join(str(number) for number in (below, above) if number)


def _fitting(config: MeshConfig, num_devices: int) -> str:
    """The sizes that fit if one axis changes, as text; if none does, plain data parallelism."""
    product = math.prod(config.sizes)
    fitting = []
    for axis in AXES:
        others = product // getattr(config, axis)
        if num_devices % others == 0:
            fitting.append(f"{axis} = {num_devices // others}")
    return " or ".join(fitting) or f"data = {num_devices} alone"
