"""A mesh for the devices that are left: `data` shrinks, and more micro-batches keep the batch."""

import dataclasses
import math

from jaxscale.parallel.mesh import MeshConfig
from jaxscale.types import InputError


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """How a run goes on with fewer devices.

    Args:
        mesh: with fewer data ranks.
        num_microbatches: with which no device has more rows at a time than before.
    """

    mesh: MeshConfig
    num_microbatches: int


def shrink(
    mesh: MeshConfig,
    num_devices: int,
    *,
    batch_size: int,
    num_microbatches: int,
) -> Shrunk:
    """The mesh itself where its devices are there, else the largest that fits those that are.

    The axes but `data` hold the model, and stay. The global batch stays too, so the data order is
    the one that the whole mesh would have had; load-balance losses count experts' shares in each
    micro-batch and change with their number.

    Args:
        mesh: as it was.
        num_devices: that are there.
        batch_size: rows of a global batch.
        num_microbatches: as it was.
    Raises:
        InputError: the model does not fit, or no number of data ranks divides the batch; names
            meshes that fit.
    """
    if math.prod(mesh.sizes) <= num_devices:
        return Shrunk(mesh, num_microbatches)
    num_model = math.prod(mesh.sizes) // mesh.data
    for data in range(num_devices // num_model, 0, -1):
        shards = data * mesh.expert
        num_rows, rest = divmod(batch_size, shards)
        if rest:
            continue
        # As few micro-batches as keep a device's rows at a time, and divide its share.
        at_least = -(-num_microbatches * mesh.data // data)
        divisors = [n for n in range(at_least, num_rows + 1) if num_rows % n == 0]
        if divisors:
            return Shrunk(dataclasses.replace(mesh, data=data), divisors[0])
    raise InputError("MeshConfig", mesh.sizes, _expected(mesh, num_devices, num_model))


def _expected(mesh: MeshConfig, num_devices: int, num_model: int) -> str:
    """Which devices the model needs, and sizes of one axis with which it fits those there are."""
    needed = f"pipeline * expert * sequence * tensor = {num_model} devices or more for the model"
    fitting = []
    for axis in ("pipeline", "expert", "sequence", "tensor"):
        others = num_model // getattr(mesh, axis)
        # A divisor cuts whatever the axis itself did.
        sizes = [n for n in range(1, getattr(mesh, axis)) if getattr(mesh, axis) % n == 0]
        sizes = [n for n in sizes if n * others <= num_devices]
        if sizes:
            fitting.append(f"{axis} = {sizes[-1]} with data = 1")
    nearest = " or ".join(fitting) or "data alone"
    return (
        f"{needed} and a batch that data * expert divides, with {num_devices}; nearest: {nearest}"
    )
