"""How orbax writes and reads the items of a checkpoint: `state`, `data` and `meta`."""

import contextlib
import functools
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata_store

# Orbax has no public name for when a leaf is copied to the host.
from orbax.checkpoint._src.serialization import types as transfer

from jaxscale.types import InputError

# A restore reads whole chunks, so the chunk's size bounds what it reads in vain when the sharding
# is another than that of the save.
CHUNK_BYTES = 1 << 26
# Of a state on devices that are copied to the host at once; less than any leaf: one by one.
COPIED_GB = 1e-9
# tensorstore reports a full disk as a ValueError with this in its message.
TENSORSTORE_OS_ERROR = "os_error_code="
CLOSED_LOOP = "Event loop is closed"
STREAMED_WARNING = "No prioritized params found for saving"


class LeafFolders(ocp.PyTreeCheckpointHandler):
    """Stores each leaf in a folder of its own, so that a damaged file names its leaf."""

    def __init__(self):
        arrays = _LargestFirst(
            array_metadata_store=array_metadata_store.Store(),
            callback=_WhileWriting(),
        )
        super().__init__(
            use_ocdbt=False,
            use_compression=False,  # see experiments/results/LOG.md
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (jax.Array, arrays),
            ),
            save_device_host_concurrent_gb=COPIED_GB,
        )

    def finalize(self, directory: Any) -> None:
        """Does nothing: orbax would merge the files of all processes here."""


class _WhileWriting(transfer.SerializationStatusCallback):
    """Leaves are copied to the host while others are written, not all before a save returns.

    So they must stay as they are until it is committed.
    """

    def key_priority(self, keypath: Any) -> transfer.TransferPriority:
        """The same for each leaf."""
        return transfer.TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


class _LargestFirst(ocp.type_handlers.ArrayHandler):
    """Copies the largest leaves to the host first.

    Orbax holds a leaf until the next one is copied. In this order memory for two of the largest is
    enough: each leaf fits where one before it was. In another what is free comes to lie in pieces,
    and memory is pinned anew, which holds the device up.
    """

    async def serialize(
        self,
        values: Sequence[jax.Array],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Any:
        """As of the class above."""
        args = args or [ocp.SaveArgs()] * len(values)
        order = sorted(range(len(values)), key=lambda number: -values[number].nbytes)
        columns = [[column[number] for number in order] for column in (values, infos, args)]
        return await super().serialize(*columns)


def make_handler(leaves: LeafFolders) -> ocp.CompositeCheckpointHandler:
    """The handler of a whole checkpoint; `leaves` handles its `state`."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, leaves)
    for item in ("data", "meta"):
        json_handler = ocp.JsonCheckpointHandler()
        registry.add(item, ocp.args.JsonSave, json_handler)
        registry.add(item, ocp.args.JsonRestore, json_handler)
    return ocp.CompositeCheckpointHandler(
        handler_registry=registry,
        composite_options=ocp.CompositeOptions(multiprocessing_options=all_processes()),
    )


def all_processes() -> ocp.options.MultiprocessingOptions:
    """All processes, which wait for each other through their coordinator.

    Where orbax is not told which they are they do so by a sum over all devices, which no thread may
    ask for beside the steps.
    """
    return ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))


def state_to_save(state: Any) -> ocp.args.PyTreeSave:
    """What orbax needs to save `state` in chunks of at most CHUNK_BYTES."""
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
    return ocp.args.PyTreeSave(state, save_args=save_args)


def is_os_error(error: Exception) -> bool:
    """Whether orbax raised `error` because the file system refused."""
    if isinstance(error, ValueError):
        return TENSORSTORE_OS_ERROR in str(error)
    return isinstance(error, OSError)


def reason(error: Exception) -> str:
    """What the file system said, without TensorStore's account of what it was about."""
    found = re.search(r"([^:\[]+) \[(?:tensorstore_spec|os_error_code)=", str(error))
    return found[1].strip() if found else str(error)


@contextlib.contextmanager
def write_errors_named(parameter: str, folder: Path, expected: str) -> Iterator[None]:
    """Turns the file system's refusal to write into InputError.

    Args:
        parameter: that names the folder.
        folder: where is written.
        expected: what it should have been.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        if not is_os_error(error):
            raise
        raise InputError(parameter, str(folder), f"{expected} ({reason(error)})") from error


@functools.cache
def silence() -> None:
    """Drops what orbax says and nobody needs, for as long as the process lives.

    That is the tracebacks, several times over, of an error that it then raises, and its warning
    that a streamed save is one. After one write has failed, each that ends later finds orbax's
    event loop closed, and Python reports that too.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_wanted)
    report = sys.unraisablehook

    def report_but_late_writes(lost: Any) -> None:
        if str(lost.exc_value) != CLOSED_LOOP:
            report(lost)

    sys.unraisablehook = report_but_late_writes


def _is_wanted(record: logging.LogRecord) -> bool:
    if record.exc_info:
        frames = traceback.walk_tb(record.exc_info[2])
        files = [frame.f_code.co_filename for frame, _ in frames]
        return "orbax" not in record.pathname + record.getMessage() + "".join(files)
    return not record.getMessage().startswith(STREAMED_WARNING)
