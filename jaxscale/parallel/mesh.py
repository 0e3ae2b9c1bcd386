"""The five mesh axes as one validated configuration."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxscale.types import InputError, check_positive, check_types

PIPELINE, DATA, EXPERT, SEQUENCE, TENSOR = AXES = ("pipeline", "data", "expert", "sequence", "tensor")
BATCH_SPEC = PartitionSpec((DATA, EXPERT), SEQUENCE)  # [B, T]: dense layers share the batch over data and expert


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the axes, outermost on the slowest link, and the ZeRO level.

    Args:
        pipeline: stages of the layer stack; 1 for now.
        data: replicas of the model, over which ZeRO shards.
        expert: shares of the experts; dense layers use it as more data.
        sequence: shares of the sequence; 1 for now.
        tensor: shares of heads, feed-forward, experts' width and vocabulary.
        zero: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters sharded over `data`
            (arXiv 1910.02054, section 5).
    """

    pipeline: int = 1
    data: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    zero: int = 1

    def __post_init__(self):
        check_types(self)
        for axis in AXES:
            check_positive(f"MeshConfig.{axis}", getattr(self, axis))
        for axis in (PIPELINE, SEQUENCE):
            if getattr(self, axis) != 1:
                raise InputError(f"MeshConfig.{axis}", getattr(self, axis), "1: this axis is not available yet")
        if self.zero not in (0, 1, 2, 3):
            raise InputError("MeshConfig.zero", self.zero, "0, 1, 2 or 3")

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
        equation = " * ".join(AXES) + " = " + " * ".join(map(str, config.sizes)) + f" = {math.prod(config.sizes)}"
        raise InputError("MeshConfig", config.sizes, f"{equation} to equal the number of devices, {len(devices)}")
    return Mesh(np.asarray(devices).reshape(config.sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(config: MeshConfig, *, batch_size: int, length: int, num_microbatches: int) -> None:
    """Raises InputError unless [batch_size, length] divides over the mesh and the micro-batches."""
    shards = config.num_batch_shards * num_microbatches
    if batch_size % shards:
        raise InputError(
            "DataConfig.batch_size",
            batch_size,
            f"batch_size % (data * expert * num_microbatches) == 0, here {batch_size} % ({config.data} * "
            f"{config.expert} * {num_microbatches}) = {batch_size % shards}",
        )
    if length % (config.sequence * config.tensor):
        raise InputError(
            "DataConfig.sequence_length",
            length,
            f"sequence_length % (sequence * tensor) == 0, here {length} % ({config.sequence} * {config.tensor}) = "
            f"{length % (config.sequence * config.tensor)}",
        )
