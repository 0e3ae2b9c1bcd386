"""Writes and reads steps through orbax; where device memory has room, from a snapshot of the state.

Orbax's asynchronous save returns when the state is copied to the host, which holds a step up by
its bytes over the link. A snapshot is a copy in device memory, a read and a write of it; the copy
to the host then goes on beside the next steps.
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

from jaxscale.checkpoint import handlers

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
        self._leaves = handlers.LeafFolders()
        self._checkpointer = ocp.AsyncCheckpointer(
            handlers.make_handler(self._leaves),
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=on_written,
                create_directories_asynchronously=False,
            ),
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._copying: concurrent.futures.Future | None = None

    def prepare(self, abstract_state: Any) -> None:
        """Takes the host memory through which snapshots are copied.

        A driver pins memory at about 0.5 s a GiB, and holds the device up meanwhile.

        Args:
            abstract_state: tree of jax.ShapeDtypeStruct with shardings, as `save` gets it.
        """
        place = _pinned_memory()
        if place is None or not self._is_async or self._use_snapshot is False:
            return
        # Orbax lets go of a batch, which is a leaf at least, when the next one is copied.
        largest = max(map(_own_bytes, jax.tree.leaves(abstract_state)), default=0)
        batch = max(largest, handlers.STREAMED_GB * 10**9)
        jax.device_put(np.empty(2 * batch, np.uint8), place).block_until_ready()

    def save(self, path: pathlib.Path, state: Any, **items: Any) -> None:
        """Starts writing a step; the state may be donated as soon as this returns."""
        arguments = {name: ocp.args.JsonSave(item) for name, item in items.items()}

        def write(state: Any, *, is_streamed: bool) -> None:
            self._leaves.set_streamed(is_streamed)
            args = ocp.args.Composite(state=handlers.state_to_save(state), **arguments)
            self._checkpointer.save(path, args=args)

        if not (self._is_async and self._takes_snapshot(state)):
            write(state, is_streamed=False)
        elif jax.process_count() > 1:
            # Processes wait for each other in between, in the order in which each of them calls.
            write(_snapshot(state), is_streamed=True)
        else:
            self._copying = self._thread.submit(write, _snapshot(state), is_streamed=True)

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
    return jax.sharding.SingleDeviceSharding(device, memory_kind=PINNED)


def _own_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a leaf on the devices of this process."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0  # a few words
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return shard * len(leaf.sharding.addressable_devices)


def _is_on_device(leaf: jax.Array) -> bool:
    (device, *_) = leaf.sharding.device_set
    return leaf.sharding.memory_kind == device.default_memory().kind


def _snapshot(state: Any) -> Any:
    """The state copied where it lies."""

    def copied(leaf: jax.Array) -> jax.Array:
        # By the runtime: a compiled copy would hold the first save up for its compilation.
        return jax.device_put(leaf, leaf.sharding, may_alias=False)

    return jax.tree.map(copied, state)
