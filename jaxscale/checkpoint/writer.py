"""Writes and reads steps through orbax, from a copy of the state.

Where device memory has room the copy is a snapshot there, a read and a write of it, whose own copy
to the host goes on beside the next steps. Else it is in host memory, and holds a step up by the
state's bytes over the link.
"""

import collections
import concurrent.futures
import logging
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from jaxscale.checkpoint import handlers, native

logger = logging.getLogger(__name__)

PINNED = "pinned_host"


class Writer:
    """Writes one step at a time.

    Args:
        on_written: called on the primary process when every file of a step is written.
        is_async: write while the caller goes on.
        use_snapshot: copy the state in device memory first; None: where there is room.
    """

    def __init__(
        self,
        on_written: Callable[[], None],
        *,
        is_async: bool,
        use_snapshot: bool | None,
    ):
        handlers.silence()
        self._is_async = is_async
        self._use_snapshot = use_snapshot
        self._checkpointer = ocp.AsyncCheckpointer(
            handlers.make_handler(handlers.LeafFolders()),
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=on_written,
                create_directories_asynchronously=False,
            ),
            multiprocessing_options=handlers.all_processes(),
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._copying: concurrent.futures.Future | None = None

    def prepare(self, abstract_state: Any) -> None:
        """Takes the host memory through which snapshots are copied.

        A driver pins memory at about 0.5 s a GiB, and holds the device up meanwhile.

        Args:
            abstract_state: tree of jax.ShapeDtypeStruct with shardings, as `save` gets it.
        Raises:
            InputError: it cannot be stored.
        """
        native.check_storable(abstract_state)
        place = _pinned_memory()
        if place is None or not self._is_async or self._use_snapshot is False:
            return
        # One leaf is copied while the one before is written.
        largest = max(map(_own_bytes, jax.tree.leaves(abstract_state)), default=0)
        jax.device_put(np.empty(2 * largest, np.uint8), place).block_until_ready()

    def save(self, path: pathlib.Path, state: Any, **items: Any) -> None:
        """Starts writing a step; where that is asynchronous, the state may be donated at once.

        Raises:
            InputError: the state cannot be stored.
        """
        native.check_storable(state)
        arguments = {name: ocp.args.JsonSave(item) for name, item in items.items()}

        def write(state: Any) -> None:
            args = ocp.args.Composite(state=handlers.state_to_save(state), **arguments)
            self._checkpointer.save(path, args=args)

        if not self._is_async:
            write(state)
            return
        copied = _copied(state, is_on_device=self._takes_snapshot(state))
        self._copying = self._thread.submit(write, copied)

    def wait(self) -> None:
        """Returns once the last step is committed; raises what went wrong with it."""
        copying, self._copying = self._copying, None
        try:
            if copying is not None:
                copying.result()
        finally:
            try:
                self._checkpointer.wait_until_finished()
            finally:
                # After an error orbax's writer of metadata is still at work: wait for it too.
                self._checkpointer.wait_until_finished()

    def read(self, path: pathlib.Path, **items: Any) -> Any:
        """The items of a step, as the arguments of orbax ask for them."""
        return self._checkpointer.restore(path, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Releases the threads."""
        self._thread.shutdown()
        self._checkpointer.close()

    def _takes_snapshot(self, state: Any) -> bool:
        if self._use_snapshot is not None:
            return self._use_snapshot
        reason = _why_not(state)
        if reason is None:
            logger.info("saves: a snapshot on the device, copied to the host during the next steps")
            return True
        logger.info("saves: copied to the host before the next step, as %s", reason)
        return False


def _why_not(state: Any) -> str | None:
    """Why there can be no snapshot; None where there can."""
    needed: dict[jax.Device, int] = collections.Counter()
    for leaf in jax.tree.leaves(state):
        if not _is_on_device(leaf):
            return "a part of the state rests in host memory, where a copy takes as long"
        for shard in leaf.addressable_shards:
            needed[shard.device] += shard.data.nbytes
    for device, num_bytes in needed.items():
        free = _free_bytes(device)
        if free is None:
            return f"{device.device_kind} does not say how much memory is free"
        if num_bytes > free:
            return f"{num_bytes / 1e9:.2f} GB on {device} are not free, but {free / 1e9:.2f}"
    return None


def _free_bytes(device: jax.Device) -> int | None:
    """What a device's memory has left at the fullest moment so far; None where it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "peak_bytes_in_use" not in stats:
        return None
    return stats["bytes_limit"] - stats["peak_bytes_in_use"]


def _pinned_memory() -> jax.sharding.Sharding | None:
    """Where copies of a device's memory go; None where there are no devices of their own."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    return SingleDeviceSharding(device, memory_kind=PINNED)


def _own_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a leaf on the devices of this process."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0  # a few words
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return shard * len(leaf.sharding.addressable_devices)


def _is_on_device(leaf: jax.Array) -> bool:
    (device, *_) = leaf.sharding.device_set
    return leaf.sharding.memory_kind == device.default_memory().kind


def _copied(state: Any, *, is_on_device: bool) -> Any:
    """The state copied by the runtime, which compiles nothing; on the host, it is there already.

    Args:
        state: tree of jax arrays.
        is_on_device: copy each leaf where it lies, and do not wait.
    """
    place = None if is_on_device else _pinned_memory()

    def copied(leaf: jax.Array) -> jax.Array:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        sharding = leaf.sharding
        if place is not None and not is_key:
            sharding = sharding.with_memory_kind(PINNED)
        if leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding, may_alias=False)
        parts = []  # of an array over several processes, for which device_put would compile
        for shard in leaf.addressable_shards:
            own = SingleDeviceSharding(shard.device, memory_kind=sharding.memory_kind)
            parts.append(jax.device_put(shard.data, own, may_alias=False))
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    copies = jax.tree.map(copied, state)
    return copies if is_on_device else jax.block_until_ready(copies)
