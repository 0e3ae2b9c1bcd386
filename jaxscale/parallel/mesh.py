"""The five mesh axes as one validated configuration."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxscale.types import InputError, check_choice, check_positive, check_types

PIPELINE, DATA, EXPERT, SEQUENCE, TENSOR = AXES = (
    "pipeline",
    "data",
    "expert",
    "sequence",
    "tensor",
)
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
BATCH_SPEC = PartitionSpec(
    (DATA, EXPERT), SEQUENCE
)  # [B, T]: dense layers share the batch over data and expert


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the axes, outermost on the slowest link, and how each axis is used.

    Args:
        pipeline: stages of the layer stack.
        data: replicas of the model, over which ZeRO shards.
        expert: shares of the experts; dense layers use it as more data.
        sequence: shares of the sequence.
        tensor: shares of heads, feed-forward, experts' width and vocabulary.
        zero: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters sharded over
            `zero_axes` (arXiv 1910.02054, section 5). Gradients add up whole over the micro-batches
            and are cut at the step's end, once; under 3 each micro-batch's is cut. A layer without
            rematerialisation keeps its gathered parameters for the backward: under 3 it then takes
            the memory of all of them in the compute type, and gathers once.
        zero_axes: ("data",) or ("data", "sequence"): both hold replicas of the parameters.
        ring: of the `sequence` shares, rings of so many pass keys round (arXiv 2310.01889); the
            sequence / ring members of a group exchange heads (arXiv 2309.14509).
        schedule: of the pipeline, one of SCHEDULES.
        num_chunks: chunks of the stack that each stage holds, above 1 for "interleaved".
        stage_periods: periods of the stack in each chunk, in the order of the layers; None is as
            even as possible.
        expert_axis: "expert" exchanges tokens; "tensor" holds whole experts on each tensor rank,
            which sees all its group's tokens already (arXiv 2409.12136, section 3.2).
        expert_exchange: "dense", worst-case buffers; "ragged", only the rows there are (GPU).
        is_optimizer_on_host: the optimizer's moments rest in host memory between updates; a step
            moves them to the device and back, an eighth or one parameter's at a time.
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
    expert_exchange: str = "dense"
    is_optimizer_on_host: bool = False

    def __post_init__(self):
        check_types(self)
        for name in (*AXES, "ring", "num_chunks"):
            check_positive(f"MeshConfig.{name}", getattr(self, name))
        if self.zero not in (0, 1, 2, 3):
            raise InputError("MeshConfig.zero", self.zero, "0, 1, 2 or 3")
        check_choice("MeshConfig.zero_axes", self.zero_axes, ((DATA,), (DATA, SEQUENCE)))
        check_choice("MeshConfig.schedule", self.schedule, SCHEDULES)
        check_choice("MeshConfig.expert_axis", self.expert_axis, (EXPERT, TENSOR))
        check_choice("MeshConfig.expert_exchange", self.expert_exchange, ("dense", "ragged"))
        if self.sequence % self.ring:
            equation = f"sequence % ring == 0, but {self.sequence} % {self.ring} = {self.sequence % self.ring}"
            nearest = nearest_divisors(self.sequence, self.ring)
            raise InputError("MeshConfig.ring", self.ring, f"{equation}; nearest: {nearest}")
        if self.num_chunks > 1 and self.schedule != "interleaved":
            raise InputError(
                "MeshConfig.num_chunks", self.num_chunks, '1 unless schedule is "interleaved"'
            )

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
    devices = jax.devices() if devices is None else devices
    if math.prod(config.sizes) != len(devices):
        equation = (
            " * ".join(AXES)
            + " = "
            + " * ".join(map(str, config.sizes))
            + f" = {math.prod(config.sizes)}"
        )
        expected = f"{equation} to equal the number of devices, {len(devices)}; nearest: {_fitting(config, len(devices))}"
        raise InputError("MeshConfig", config.sizes, expected)
    return Mesh(
        np.asarray(devices).reshape(config.sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def check_batch(config: MeshConfig, *, batch_size: int, length: int, num_microbatches: int) -> None:
    """Raises InputError unless [batch_size, length] divides over the mesh and the micro-batches."""
    shards = config.num_batch_shards * num_microbatches
    if rest := batch_size % shards:
        raise InputError(
            "DataConfig.batch_size",
            batch_size,
            f"batch_size % (data * expert * num_microbatches) == 0, here {batch_size} % ({config.data} * "
            f"{config.expert} * {num_microbatches}) = {rest}; nearest: {nearest_multiples(batch_size, shards)}",
        )
    for equation, parts in (
        (
            f"(sequence * tensor) == 0, here {length} % ({config.sequence} * {config.tensor})",
            config.sequence * config.tensor,
        ),
        (
            f"(2 * ring) == 0, here {length} % (2 * {config.ring})",
            2 * config.ring if config.ring > 1 else 1,
        ),
    ):
        if rest := length % parts:
            expected = f"sequence_length % {equation} = {rest}; nearest: {nearest_multiples(length, parts)}"
            raise InputError("DataConfig.sequence_length", length, expected)


def nearest_divisors(size: int, given: int) -> str:
    """The divisors of `size` next below and above `given`, as text."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    below = [number for number in divisors if number <= given][-1:]
    above = [number for number in divisors if number > given][:1]
    return " or ".join(map(str, below + above))


def nearest_multiples(given: int, factor: int) -> str:
    """The positive multiples of `factor` next below and above `given`, as text."""
    below = given - given % factor
    return " or ".join(str(number) for number in (below, below + factor) if number)


def _fitting(config: MeshConfig, num_devices: int) -> str:
    """The sizes that fit if one axis changes, as text; if none does, plain data parallelism."""
    product = math.prod(config.sizes)
    others = {axis: product // getattr(config, axis) for axis in AXES}
    fitting = [
        f"{axis} = {num_devices // other}"
        for axis, other in others.items()
        if num_devices % other == 0
    ]
    return " or ".join(fitting) or f"data = {num_devices} alone"
