"""How orbax writes and reads the items of a checkpoint: `state`, `data` and `meta`."""

import logging
from typing import Any

import jax
import orbax.checkpoint as ocp

# A restore reads whole chunks, so the chunk's size bounds what it reads in vain when the sharding
# is another than that of the save.
CHUNK_BYTES = 1 << 26
# tensorstore reports a full disk as a ValueError with this in its message.
TENSORSTORE_OS_ERROR = "os_error_code="


class LeafFolders(ocp.PyTreeCheckpointHandler):
    """Stores each leaf in a folder of its own, so that a damaged file names its leaf."""

    def __init__(self):
        super().__init__(use_ocdbt=False)

    def finalize(self, directory: Any) -> None:
        """Does nothing: orbax would merge the files of all processes here."""


def make_handler(leaves: LeafFolders) -> ocp.CompositeCheckpointHandler:
    """The handler of a whole checkpoint; `leaves` handles its `state`."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, leaves)
    registry.add("state", ocp.args.PyTreeRestore, leaves)
    for item in ("data", "meta"):
        json_handler = ocp.JsonCheckpointHandler()
        registry.add(item, ocp.args.JsonSave, json_handler)
        registry.add(item, ocp.args.JsonRestore, json_handler)
    return ocp.CompositeCheckpointHandler(handler_registry=registry)


def state_to_save(state: Any) -> ocp.args.PyTreeSave:
    """What orbax needs to save `state` in chunks of at most CHUNK_BYTES."""
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
    return ocp.args.PyTreeSave(state, save_args=save_args)


def state_to_restore(abstract: Any, *, is_partial: bool = False) -> ocp.args.PyTreeRestore:
    """What orbax needs to restore a state, placed as asked.

    Args:
        abstract: tree of jax.ShapeDtypeStruct with shardings.
        is_partial: the checkpoint has other leaves too; they are not read.
    """
    return ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=is_partial,
    )


def is_os_error(error: Exception) -> bool:
    """Whether orbax raised `error` because the file system refused."""
    if isinstance(error, ValueError):
        return TENSORSTORE_OS_ERROR in str(error)
    return isinstance(error, OSError)


def silence_tracebacks() -> None:
    """Drops the tracebacks that orbax logs, several times over, of an error that it then raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_traceback_of_orbax)


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    if not record.exc_info:
        return True
    return "orbax" not in record.pathname + record.getMessage()
