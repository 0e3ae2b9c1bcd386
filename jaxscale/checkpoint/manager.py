"""Saves and restores the training state: asynchronous, atomic, checksummed, on any mesh.

On disk: `<directory>/<step>/{state,data,meta}` and `checksums.json`; in `state` one folder per
leaf, named by its path.
"""

import contextlib
import dataclasses
import logging
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxscale.checkpoint import handlers, manifest, matching, steps
from jaxscale.checkpoint.changes import Changes, load_changed
from jaxscale.checkpoint.loading import load
from jaxscale.checkpoint.mirror import Mirror, MirrorConfig
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.checkpoint.writer import Writer
from jaxscale.types import InputError, check_positive, check_types

logger = logging.getLogger(__name__)

BUDGET_BYTES = 1 << 32  # of host memory, while leaves are read one by one


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where and how often to save, and what to keep.

    Args:
        directory: local or shared folder of the run's checkpoints; created when first needed.
        save_every: steps between checkpoints.
        keep_last: how many of the newest checkpoints to keep.
        keep_every: keep also, for ever, the steps that are multiples of this; a multiple of
            `save_every`.
        keep_hours: keep also those written in the last hours.
        keep_closest: keep also, of each multiple of this, the closest step; also where steps are
            saved at other numbers, as at a signal.
        is_async: write while training goes on.
        use_snapshot: copy the state in device memory first, which frees the step at once; None:
            where there is room for it, which is logged.
        mirror: an object store that gets each committed step, and gives back the newest.
        use_previous: when the newest checkpoint is damaged, restore the one before instead of
            stopping.
    """

    directory: str
    save_every: int
    keep_last: int
    keep_every: int | None = None
    keep_hours: float | None = None
    keep_closest: int | None = None
    is_async: bool = True
    use_snapshot: bool | None = None
    mirror: MirrorConfig | None = None
    use_previous: bool = False

    def __post_init__(self):
        check_types(self)
        check_positive("CheckpointConfig.save_every", self.save_every)
        check_positive("CheckpointConfig.keep_last", self.keep_last)
        for name in ("keep_hours", "keep_closest"):
            if getattr(self, name) is not None:
                check_positive(f"CheckpointConfig.{name}", getattr(self, name))
        if self.keep_every is not None:
            is_multiple = self.keep_every > 0 and self.keep_every % self.save_every == 0
            if not is_multiple:
                expected = f"keep_every % save_every == 0, with save_every = {self.save_every}"
                raise InputError("CheckpointConfig.keep_every", self.keep_every, expected)
        if not self.directory or "://" in self.directory:
            expected = "the path of a local or mounted folder; `mirror` names an object store"
            raise InputError("CheckpointConfig.directory", self.directory, expected)

    @property
    def keeping(self) -> steps.Keeping:
        """Which steps are kept."""
        return steps.Keeping(self.keep_last, self.keep_every, self.keep_hours, self.keep_closest)

    def within(self, run: str | pathlib.Path) -> "CheckpointConfig":
        """This configuration with its directory taken relative to that of a run.

        "~" is the user's home in both.
        """
        directory = pathlib.Path(self.directory).expanduser()
        joined = pathlib.Path(run).expanduser() / directory
        return dataclasses.replace(self, directory=str(joined))


class Checkpoints:
    """The checkpoints of one run; in a run of several processes each of them makes every call.

    Args:
        config: where and how often.
        fingerprint: JSON-able facts of the model; a checkpoint with others is not restored.
        upgrade: makes facts of the present form out of those that a checkpoint has recorded.

    Raises:
        InputError: `config.directory` is a file.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        fingerprint: dict[str, Any],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda facts: facts,
    ):
        self._config = config
        self._fingerprint = fingerprint
        self._upgrade = upgrade
        self._directory = pathlib.Path(config.directory).expanduser().absolute()
        if self._directory.exists() and not self._directory.is_dir():
            raise self._input_error("a folder; this is a file")
        self._saving: int | None = None
        self._damaged: list[int] = []
        self._mirror: Mirror | None = None
        if config.mirror is not None and jax.process_index() == 0:
            self._mirror = Mirror(config.mirror, self._directory)
        self._writer = Writer(
            self._write_manifest,
            is_async=config.is_async,
            use_snapshot=config.use_snapshot,
        )

    def prepare(self, abstract_state: Any) -> None:
        """Makes the directory, and lets the first save hold a step up no longer than others do.

        Args:
            abstract_state: as `restore`.
        Raises:
            InputError: no file can be created in the directory.
        """
        with self._write_errors_named("a folder in which files can be created"):
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                pass
        self._writer.prepare(abstract_state)

    def latest_step(self) -> int | None:
        """Returns the newest committed step, damaged or not."""
        committed = self._committed()
        newest = committed[-1] if committed else -1
        if jax.process_count() > 1:
            # Processes may see different listings of a shared folder for a while.
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def fetch(self) -> None:
        """Brings the newest step of the mirror, where the directory has none as new.
        Raises:
            InputError: the mirror cannot be read, or the step is damaged.
        """
        if self._mirror is not None:
            self._mirror.fetch_newer(self._committed())
        if self._config.mirror is not None and jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints are fetched")

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
        is_due = step % self._config.save_every == 0
        if not (is_due or force):
            return False
        self.wait()
        if not self._make_room(step):
            return False
        self._saving = step
        meta = {"fingerprint": self._fingerprint}
        with self._write_errors_named(f"a folder in which step {step} can be written"):
            self._writer.save(self._path(step), state, data=data_state, meta=meta)
        if self._mirror is not None:
            self._mirror.follow(step, self._config.keeping)
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
        step, is_committed = self._saving, False
        try:
            with self._write_errors_named(f"a folder in which step {step} can be written"):
                self._writer.wait()
            is_committed = True
        finally:
            self._saving = None
            if self._mirror is not None:
                self._mirror.wait(is_committed=is_committed)
        if jax.process_index() == 0:
            steps.keep_only(self._directory, self._config.keeping)

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
        path = self._sound_path(step)
        leaves = NativeCheckpoint(path).leaves()
        matching.check_leaves(leaves, abstract_state, str(path), is_cast_allowed=False)
        state = load(leaves, abstract_state, budget_bytes=BUDGET_BYTES)
        return state, self._data_state(path)

    def restore_params(
        self,
        abstract_params: Any,
        step: int | None = None,
        left_out: tuple[str, ...] = (),
        is_averaged: bool = False,
    ) -> Any:
        """Returns the parameters alone, placed as asked and cast where another dtype is asked.

        Args:
            abstract_params: tree of jax.ShapeDtypeStruct with shardings, on any mesh.
            step: which one; the newest when None.
            left_out: sections that the checkpoint has beside those that are asked for.
            is_averaged: as `NativeCheckpoint.params`.
        Raises:
            InputError: as `restore`.
        """
        is_wanted = manifest.is_for_averages if is_averaged else manifest.is_for_params
        path = self._sound_path(step, is_wanted)
        leaves = NativeCheckpoint(path).params(left_out, is_averaged=is_averaged)
        matching.check_leaves(leaves, abstract_params, str(path), is_cast_allowed=True)
        return load(leaves, abstract_params, budget_bytes=BUDGET_BYTES)

    def restore_changed(
        self, abstract_state: Any, changes: Changes, *, budget_bytes: int = BUDGET_BYTES
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the newest state but for what is drawn anew, and the loader's position.

        The recorded facts of the model may differ; that is logged. Shapes may not.

        Args:
            abstract_state: as `restore`.
            changes: what may differ.
            budget_bytes: of host memory beyond the arrays.
        Returns:
            The state, with None for what is to be drawn.
        Raises:
            InputError: as `restore`, or something differs that `changes` does not name.
        """
        path = self._sound_path(None, is_changed=True)
        state = load_changed(path, abstract_state, changes, budget_bytes=budget_bytes)
        return state, self._data_state(path)

    def data_state(self, step: int | None = None) -> dict[str, Any]:
        """Returns the loader's position alone; arguments and errors as `restore_params`."""
        return self._data_state(self._sound_path(step, lambda name: name.startswith("data/")))

    def close(self) -> None:
        """Waits and releases the writer's threads."""
        try:
            self.wait()
        finally:
            self._writer.close()
            if self._mirror is not None:
                self._mirror.close()

    def _data_state(self, path: pathlib.Path) -> dict[str, Any]:
        return self._writer.read(path, data=ocp.args.JsonRestore()).data

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)

    def _write_manifest(self) -> None:
        """Called by orbax on the primary process when every file is written.

        The step is renamed from its temporary name only afterwards, so every committed step has a
        manifest.
        """
        temporary = f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}"
        manifest.write_manifest(self._directory / temporary)

    def _committed(self) -> list[int]:
        committed = steps.committed_steps(self._directory)
        return [step for step in committed if step not in self._damaged]

    def _make_room(self, step: int) -> bool:
        """Clears away what is in the way of `step`; returns False when it is committed already."""
        newest = self.latest_step()
        if newest is not None and newest > step:
            raise self._input_error(
                f"a folder without checkpoints newer than step {step}; this one has step {newest}"
            )
        if newest == step:
            return False
        if jax.process_index() == 0:
            with self._write_errors_named(f"a folder in which step {step} can be written"):
                self._directory.mkdir(parents=True, exist_ok=True)
                steps.remove_leftovers(self._directory)
                for damaged in self._damaged:
                    target = steps.set_aside(self._directory, damaged)
                    logger.warning("damaged checkpoint moved to %s", target)
        self._damaged.clear()
        return True

    def _sound_path(
        self,
        step: int | None,
        is_wanted: Callable[[str], bool] = lambda name: True,
        *,
        is_changed: bool = False,
    ) -> pathlib.Path:
        """Returns the folder of the newest sound step, not above `step`.

        A step is sound when its wanted files are as they were written. `is_changed` says that it
        may be of another model.
        """
        self.wait()
        for candidate in self._candidates(step):
            path = self._path(candidate)
            damage = self._find_damage(path, lambda name: name.startswith("meta/"))
            if damage is None:
                self._check_model(path, is_changed)
                damage = self._find_damage(path, is_wanted)
            if damage is None:
                return path
            if not self._config.use_previous:
                expected = f"a sound checkpoint; {damage}; {self._advice(candidate)}"
                raise InputError("checkpoint.directory", str(path), expected)
            logger.warning("checkpoint %s is damaged (%s): passing it over", path, damage)
            self._damaged.append(candidate)
        raise self._input_error("a sound checkpoint; every one is damaged")

    def _candidates(self, step: int | None) -> list[int]:
        """The committed steps up to `step` or, when None, all; the newest first."""
        committed = self._committed()
        newest = self.latest_step()
        if newest is None:
            raise self._input_error("a folder with a checkpoint; there is none")
        if step is not None and step not in committed:
            raise InputError("step", step, f"one of the steps in {self._directory}: {committed}")
        last = newest if step is None else step
        return [number for number in reversed(committed) if number <= last]

    def _advice(self, step: int) -> str:
        previous = [number for number in self._committed() if number < step]
        if not previous:
            return "there is none before it"
        return f"checkpoint.use_previous = True restores step {previous[-1]}"

    def _find_damage(self, path: pathlib.Path, is_wanted: Callable[[str], bool]) -> str | None:
        share = slice(jax.process_index(), None, jax.process_count())
        damage = manifest.find_damage(path, is_wanted, share)
        if jax.process_count() > 1:
            # Each process reads a share of the files. All must agree, or they would wait for each
            # other in different steps.
            is_damaged = np.int32(damage is not None)
            if multihost_utils.process_allgather(is_damaged).any():
                return damage or "another process names the file"
        return damage

    def _check_model(self, path: pathlib.Path, is_changed: bool) -> None:
        meta = self._writer.read(path, meta=ocp.args.JsonRestore()).meta
        saved = self._upgrade(meta["fingerprint"])
        try:
            matching.check_fingerprint(saved, self._fingerprint, str(path))
        except InputError as error:
            if not is_changed:
                raise
            logger.warning("%s", error)

    def _input_error(self, expected: str) -> InputError:
        return InputError("checkpoint.directory", str(self._directory), expected)

    def _write_errors_named(self, expected: str) -> contextlib.AbstractContextManager[None]:
        return handlers.write_errors_named("checkpoint.directory", self._directory, expected)
