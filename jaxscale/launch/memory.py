"""Whether arrays fit their devices, by arithmetic, before any of them is allocated."""

import math
from pathlib import Path
from typing import Any

import jax

from jaxscale.types import InputError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2
GIB = 1 << 30
PINNED_SHARE = 0.9  # of the host's memory; the rest is left to what runs on it


def check_fits(parameter: str, parts: dict[str, Any]) -> None:
    """Refuses arrays that this process's devices cannot hold together.

    Args:
        parameter: what is too large, for the message.
        parts: name -> tree of jax.ShapeDtypeStruct with shardings; those in host memory that a GPU
            reads do not count.
    Raises:
        InputError: bytes needed on one device and bytes there, part by part.
    """
    device = jax.local_devices()[0]
    there = _bytes_of(device)
    if there is None:
        return
    needed = {name: bytes_on_one_device(tree) for name, tree in parts.items()}
    if sum(needed.values()) > there:
        text = " + ".join(f"{size / GIB:.2f} of {name}" for name, size in needed.items())
        given = f"{sum(needed.values()) / GIB:.2f} GiB a device: {text}"
        expected = f"at most {there / GIB:.2f} GiB, which a device ({device.device_kind}) has"
        raise InputError(parameter, given, expected)


def bytes_on_one_device(tree: Any) -> int:
    """Bytes of one device's shards of a tree of jax.ShapeDtypeStruct with shardings."""

    def size(leaf: Any) -> int:
        if leaf.sharding.memory_kind == "pinned_host":
            return 0
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0  # a few words
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _bytes_of(device: jax.Device) -> int | None:
    """Memory for one device; None where nobody says. The devices of a CPU share the host's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    there = host_bytes() if device.platform == "cpu" else None
    return None if there is None else there // jax.local_device_count()


def host_bytes() -> int | None:
    """Memory that this machine could give this process; None where it does not say."""
    available = [size for size in (_available(), _left_in_cgroup()) if size is not None]
    return min(available) if available else None


def pinnable_bytes() -> int | None:
    """Memory of this machine that its GPUs together may pin; None where it does not say."""
    there = host_bytes()
    return None if there is None else int(PINNED_SHARE * there)


def _available() -> int | None:
    """What Linux could give without swapping."""
    if not MEMINFO.exists():
        return None
    lines = MEMINFO.read_text().splitlines()
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else int(kib) * 1024


def _left_in_cgroup() -> int | None:
    """What the container's limit leaves."""
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text().strip()
    return None if text == "max" else int(text) - int(used.read_text())
