"""Saves and restores the training state: asynchronous, atomic, checksummed, independent of the mesh.

On disk: `<directory>/<step>/{state,data,meta}` and `checksums.json`; in `state` one folder per
leaf, named by its path.
"""

import contextlib
import dataclasses
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxscale.checkpoint import manifest, matching, steps
from jaxscale.types import InputError, check_positive, check_types

logger = logging.getLogger(__name__)

# A chunk is the least that a restore reads, so it bounds what another sharding must read for
# nothing.
CHUNK_BYTES = 1 << 26
PARAMS_FILES = ("state/_", "state/array_metadatas/", "state/params.")
TENSORSTORE_OS_ERROR = (
    "os_error_code="  # tensorstore reports a full disk as a ValueError with this in its message
)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where and how often to save, and what to keep.

    Args:
        directory: local or shared folder of the run's checkpoints; created when first needed.
        save_every: steps between checkpoints.
        keep_last: how many of the newest checkpoints to keep.
        keep_every: keep also, for ever, the steps that are multiples of this; a multiple of
            `save_every`.
        is_async: write while training goes on.
        use_previous: when the newest checkpoint is damaged, restore the one before instead of
            stopping.
    """

    directory: str
    save_every: int
    keep_last: int
    keep_every: int | None = None
    is_async: bool = True
    use_previous: bool = False

    def __post_init__(self):
        check_types(self)
        check_positive("CheckpointConfig.save_every", self.save_every)
        check_positive("CheckpointConfig.keep_last", self.keep_last)
        if self.keep_every is not None and (
            self.keep_every <= 0 or self.keep_every % self.save_every
        ):
            expected = f"keep_every % save_every == 0, with save_every = {self.save_every}"
            raise InputError("CheckpointConfig.keep_every", self.keep_every, expected)
        if not self.directory or "://" in self.directory:
            raise InputError(
                "CheckpointConfig.directory",
                self.directory,
                "the path of a local or mounted folder",
            )

    def within(self, run: str | pathlib.Path) -> "CheckpointConfig":
        """This configuration with its directory taken relative to that of a run; "~" is the user's home in both."""
        directory = pathlib.Path(run).expanduser() / pathlib.Path(self.directory).expanduser()
        return dataclasses.replace(self, directory=str(directory))


class _LeafFolders(ocp.PyTreeCheckpointHandler):
    """Stores each leaf in its own folder, so that a damaged file names its leaf; nothing is merged at the end."""

    def finalize(self, directory: Any) -> None:
        pass


class Checkpoints:
    """The checkpoints of one run; in a run of several processes each of them makes every call.

    Args:
        config: where and how often.
        fingerprint: JSON-able facts of the model; a checkpoint with others is not restored.
        defaults: the values of those facts in checkpoints from before they were recorded.
        upgrade: makes facts of today's form out of those that a checkpoint has recorded.

    Raises:
        InputError: `config.directory` is a file.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        fingerprint: dict[str, Any],
        defaults: dict[str, Any] | None = None,
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda facts: facts,
    ):
        self._config = config
        self._fingerprint = fingerprint
        self._defaults = defaults or {}
        self._upgrade = upgrade
        self._directory = pathlib.Path(config.directory).expanduser().absolute()
        if self._directory.exists() and not self._directory.is_dir():
            raise InputError(
                "checkpoint.directory", str(self._directory), "a folder; this is a file"
            )
        self._saving: int | None = None
        self._damaged: list[int] = []
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_news)
        self._leaves = _LeafFolders(use_ocdbt=False)
        options = ocp.options.AsyncOptions(
            post_finalization_callback=self._seal, create_directories_asynchronously=False
        )
        self._checkpointer = ocp.AsyncCheckpointer(_composite(self._leaves), async_options=options)

    def check_writable(self) -> None:
        """Raises InputError unless a file can be created in the directory, which is made if need be."""
        with self._explained("a folder in which files can be created"):
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                pass

    def latest_step(self) -> int | None:
        """Returns the newest committed step, damaged or not."""
        committed = self._committed()
        newest = committed[-1] if committed else -1
        if jax.process_count() > 1:  # listings of a shared folder may lag
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def save(
        self, step: int, state: Any, data_state: dict[str, Any], *, force: bool = False
    ) -> bool:
        """Starts saving, once the save before is committed; says whether it did.

        A step that is not a multiple of `save_every` is passed over unless `force`, a committed one
        always: it holds the same state.

        Args:
            step: number of finished steps.
            state: tree of jax arrays with a child `params`; it may be donated as soon as this
                returns.
            data_state: JSON-able position of the loader, the same on every process.
            force: save also when `step` is not due.

        Raises:
            InputError: this or the previous checkpoint cannot be written, or newer ones are in the
                way.
        """
        if not force and step % self._config.save_every:
            return False
        self.wait()
        if not self._make_room(step):
            return False
        self._saving = step
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=chunks),
            data=ocp.args.JsonSave(data_state),
            meta=ocp.args.JsonSave({"fingerprint": self._fingerprint}),
        )
        with self._explained(f"a folder in which step {step} can be written"):
            self._checkpointer.save(self._path(step), args=items)
        if not self._config.is_async:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns once the last save is committed and what need not be kept is deleted.

        Raises:
            InputError: the checkpoint could not be written; earlier ones are unharmed.
        """
        if self._saving is None:
            return
        try:
            with self._explained(f"a folder in which step {self._saving} can be written"):
                try:
                    self._checkpointer.wait_until_finished()
                finally:
                    self._checkpointer.wait_until_finished()  # an error leaves orbax's writer of metadata at work
        finally:
            self._saving = None
        if jax.process_index() == 0:
            steps.keep_only(
                self._directory,
                keep_last=self._config.keep_last,
                keep_every=self._config.keep_every,
            )

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Returns the state, placed as asked, and the loader's position.

        Args:
            abstract_state: the state's tree with jax.ShapeDtypeStruct leaves that carry shardings,
                on any mesh.
            step: which one; the newest when None.

        Raises:
            InputError: there is none, it is damaged (and `use_previous` is off), or it is of
                another model.
        """
        path = self._sound_path(step, lambda name: True)
        matching.check_leaves(
            self._saved_leaves(path), abstract_state, str(path), is_cast_allowed=False
        )
        items = ocp.args.Composite(state=_restore_args(abstract_state), data=ocp.args.JsonRestore())
        restored = self._checkpointer.restore(path, args=items)
        return restored.state, restored.data

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """Returns the parameters alone, placed as asked and cast where another dtype is asked; reads nothing else.

        Args:
            abstract_params: tree of jax.ShapeDtypeStruct with shardings, on any mesh.
            step: which one; the newest when None.

        Raises:
            InputError: as `restore`.
        """
        path = self._sound_path(step, _is_for_params)
        matching.check_leaves(
            self._saved_leaves(path)["params"], abstract_params, str(path), is_cast_allowed=True
        )
        args = _restore_args({"params": abstract_params}, partial_restore=True)
        return self._checkpointer.restore(path, args=ocp.args.Composite(state=args)).state["params"]

    def data_state(self, step: int | None = None) -> dict[str, Any]:
        """Returns the loader's position alone; arguments and errors as `restore_params`."""
        path = self._sound_path(step, lambda name: name.startswith("data/"))
        return self._checkpointer.restore(
            path, args=ocp.args.Composite(data=ocp.args.JsonRestore())
        ).data

    def close(self) -> None:
        """Waits and releases the writer's threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)

    def _seal(self) -> None:
        """Called by orbax on the primary process once every file is written, before the step gets its name."""
        manifest.write_manifest(self._directory / f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}")

    def _committed(self) -> list[int]:
        return [
            step for step in steps.committed_steps(self._directory) if step not in self._damaged
        ]

    def _make_room(self, step: int) -> bool:
        """Clears away what is in the way of `step`; returns False when it is committed already."""
        newest = self.latest_step()
        if newest is not None and newest > step:
            expected = (
                f"a folder without checkpoints newer than step {step}; this one has step {newest}"
            )
            raise InputError("checkpoint.directory", str(self._directory), expected)
        if newest == step:
            return False
        if jax.process_index() == 0:
            with self._explained(f"a folder in which step {step} can be written"):
                self._directory.mkdir(parents=True, exist_ok=True)
                steps.remove_leftovers(self._directory)
                for damaged in self._damaged:
                    logger.warning(
                        "damaged checkpoint moved to %s", steps.set_aside(self._directory, damaged)
                    )
        self._damaged.clear()
        return True

    def _sound_path(self, step: int | None, is_wanted: Callable[[str], bool]) -> pathlib.Path:
        """Returns the folder of the newest step, not above `step`, whose wanted files are as they were written."""
        self.wait()
        for candidate in self._candidates(step):
            path = self._path(candidate)
            damage = self._find_damage(path, lambda name: name.startswith("meta/"))
            if damage is None:
                self._check_model(path)
                damage = self._find_damage(path, is_wanted)
            if damage is None:
                return path
            if not self._config.use_previous:
                raise InputError(
                    "checkpoint.directory",
                    str(path),
                    f"a sound checkpoint; {damage}; {self._advice(candidate)}",
                )
            logger.warning("checkpoint %s is damaged (%s): passing it over", path, damage)
            self._damaged.append(candidate)
        raise InputError(
            "checkpoint.directory", str(self._directory), "a sound checkpoint; every one is damaged"
        )

    def _candidates(self, step: int | None) -> list[int]:
        committed, newest = self._committed(), self.latest_step()
        if newest is None:
            raise InputError(
                "checkpoint.directory",
                str(self._directory),
                "a folder with a checkpoint; there is none",
            )
        if step is not None and step not in committed:
            raise InputError("step", step, f"one of the steps in {self._directory}: {committed}")
        return [
            number for number in reversed(committed) if number <= (newest if step is None else step)
        ]

    def _advice(self, step: int) -> str:
        previous = [number for number in self._committed() if number < step]
        return (
            f"checkpoint.use_previous = True restores step {previous[-1]}"
            if previous
            else "there is none before it"
        )

    def _find_damage(self, path: pathlib.Path, is_wanted: Callable[[str], bool]) -> str | None:
        share = slice(jax.process_index(), None, jax.process_count())
        damage = manifest.find_damage(path, is_wanted, share)
        if (
            jax.process_count() > 1
            and multihost_utils.process_allgather(np.int32(damage is not None)).any()
        ):
            damage = damage or "another process names the file"
        return damage

    def _check_model(self, path: pathlib.Path) -> None:
        meta = self._checkpointer.restore(
            path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta
        matching.check_fingerprint(
            self._upgrade(meta["fingerprint"]), self._fingerprint, self._defaults, str(path)
        )

    def _saved_leaves(self, path: pathlib.Path) -> Any:
        return self._leaves.metadata(epath.Path(path) / "state").tree

    @contextlib.contextmanager
    def _explained(self, expected: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and TENSORSTORE_OS_ERROR not in str(error):
                raise
            raise InputError(
                "checkpoint.directory", str(self._directory), f"{expected} ({error})"
            ) from error


def _is_for_params(name: str) -> bool:
    return name.startswith(PARAMS_FILES) or name.endswith(
        "/.zarray"
    )  # every leaf's shape is looked at


def _is_news(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that orbax logs or leaves, several times over, of an error which `wait` raises."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


def _composite(leaves: _LeafFolders) -> ocp.CompositeCheckpointHandler:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add("state", args, leaves)
    for item in ("data", "meta"):
        handler = ocp.JsonCheckpointHandler()
        for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
            registry.add(item, args, handler)
    return ocp.CompositeCheckpointHandler(handler_registry=registry)


def _restore_args(abstract: Any, *, partial_restore: bool = False) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(
        item=abstract, restore_args=restore_args, partial_restore=partial_restore
    )
