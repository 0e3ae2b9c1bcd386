"""Files of a token cache or a corpus, written whole with the hashes of their blocks."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxscale.data.checksums import BlockHashes
from jaxscale.types import InputError

CACHE_DIRECTORY = "DataConfig.cache_directory"


@contextlib.contextmanager
def appending(
    path: Path,
    hashes: dict[str, list[str]],
    parameter: str = CACHE_DIRECTORY,
) -> Iterator[Callable[[bytes], None]]:
    """A function that appends bytes to a new file, which is on the disk when the context ends.

    `hashes` then has the hashes of its blocks under its name. `parameter` gives the folder, for
    errors.
    """
    blocks = BlockHashes()
    with write_errors_named(path, parameter):
        file = path.open("wb", buffering=0)
    with file:

        def append(content: bytes) -> None:
            blocks.update(content)
            rest = memoryview(content)
            with write_errors_named(path, parameter):
                while rest:
                    num_written = file.write(rest)  # may be less than it was given
                    rest = rest[num_written:]

        yield append
        with write_errors_named(path, parameter):
            os.fsync(file.fileno())
    blocks.end()
    hashes[path.name] = blocks.digests


@contextlib.contextmanager
def only_builder(root: Path, name: str, parameter: str = CACHE_DIRECTORY) -> Iterator[None]:
    """Lets one process of a host build what is called `name` in the folder `root`.

    The operating system releases the lock when the process that holds it dies.
    """
    with write_errors_named(root, parameter):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{name}.lock").open("wb")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def write_errors_named(path: Path, parameter: str = CACHE_DIRECTORY) -> Iterator[None]:
    """Turns the file system's refusal to write into InputError."""
    try:
        yield
    except OSError as error:
        expected = f"a folder that can be written and has space ({error.strerror})"
        raise InputError(parameter, str(path), expected) from error
