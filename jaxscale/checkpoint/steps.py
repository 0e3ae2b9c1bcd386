"""The folder of a run's checkpoints: committed steps, which to keep, what to clear away.

A committed step is a folder named by its number. It gets that name by one rename, after its last
byte is written. So a killed process leaves either the step or a folder of another name. No file is
forced to the disk, so a power cut is not guarded against.
"""

import dataclasses
import datetime
import pathlib
import re
import shutil

from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

UNCOMMITTED = re.compile(r"\d+\.orbax-checkpoint-tmp")
DELETED = re.compile(r"\d+\.deleted")


def committed_steps(directory: pathlib.Path) -> list[int]:
    """Returns the committed steps in ascending order; none when there is no such directory."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        if path.name.isdecimal() and path.is_dir():
            found.append(int(path.name))
    return sorted(found)


def remove_leftovers(directory: pathlib.Path) -> None:
    """Removes what a killed process left behind: steps half written or half deleted."""
    for path in directory.iterdir():
        if UNCOMMITTED.fullmatch(path.name) or DELETED.fullmatch(path.name):
            shutil.rmtree(path)


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Which committed steps are kept: those that any of these keep.

    Args:
        last: the newest so many.
        every: the multiples of this; None for none.
        hours: those written in the last hours; None for none.
        closest: of each multiple of this the step that is closest, where steps are saved at other
            numbers, too; None for none.
    """

    last: int
    every: int | None = None
    hours: float | None = None
    closest: int | None = None

    def is_kept(self, directory: pathlib.Path, steps: list[int]) -> list[bool]:
        """Says of each step whether it is kept."""
        policies: list[policy.PreservationPolicy] = [policy.LatestN(self.last)]
        if self.hours is not None:
            policies.append(policy.LatestDuration(datetime.timedelta(hours=self.hours)))
        if self.closest is not None:
            policies.append(policy.EveryNStepsClosest(self.closest))
        if self.every is not None:
            multiples = [step for step in steps if step % self.every == 0]
            policies.append(policy.CustomSteps(multiples))
        infos = [_Info(step, _written_at(directory / str(step))) for step in steps]
        kept = policy.AnyPreservationPolicy(policies)
        return list(kept.should_preserve(infos, context=policy.PreservationContext()))


@dataclasses.dataclass(frozen=True)
class _Info:
    """What orbax's policies ask of a checkpoint."""

    step: int
    time: datetime.datetime
    metrics: None = None


def _written_at(path: pathlib.Path) -> datetime.datetime:
    seconds = path.stat().st_mtime
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)


def keep_only(directory: pathlib.Path, keeping: Keeping) -> None:
    """Deletes the committed steps that are not to be kept."""
    steps = committed_steps(directory)
    for step, is_kept in zip(steps, keeping.is_kept(directory, steps)):
        if not is_kept:
            # Rename before deleting: if this process is killed halfway, what is left must not look
            # like a damaged step.
            path = directory / str(step)
            condemned = path.rename(directory / f"{step}.deleted")
            shutil.rmtree(condemned)


def set_aside(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Renames a damaged step, so that it is no longer a committed one; returns its new path."""
    target = directory / f"{step}.damaged"
    number = 1
    while target.exists():
        number += 1
        target = directory / f"{step}.damaged.{number}"
    return (directory / str(step)).rename(target)
