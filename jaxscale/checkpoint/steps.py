"""The folder of a run's checkpoints: committed steps, which to keep, what to clear away.

A committed step is a folder named by its number. It gets that name by one rename, after its last
byte is written. So a killed process leaves either the step or a folder of another name. No file is
forced to the disk, so a power cut is not guarded against.
"""

import pathlib
import re
import shutil

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


def keep_only(directory: pathlib.Path, *, keep_last: int, keep_every: int | None) -> None:
    """Deletes all committed steps but the newest `keep_last` and the multiples of `keep_every`."""
    for step in committed_steps(directory)[:-keep_last]:
        if keep_every is None or step % keep_every:
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
