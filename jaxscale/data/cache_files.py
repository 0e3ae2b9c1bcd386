"""Files of a token cache, written with the hashes of their blocks."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxscale.data.checksums import BlockHashes
from jaxscale.types import InputError


@contextlib.contextmanager
def appending(
    path: Path,
    hashes: dict[str, list[str]],
) -> Iterator[Callable[[bytes], None]]:
    """A function that appends bytes to a new file, which is on the disk when the context ends.

    `hashes` then has the hashes of its blocks under its name.
    """
    blocks = BlockHashes()
    with write_errors_named(path):
        file = path.open("wb", buffering=0)
    with file:

        def append(content: bytes) -> None:
            blocks.update(content)
            rest = memoryview(content)
            with write_errors_named(path):
                while rest:
                    num_written = file.write(rest)  # may be less than it was given
                    rest = rest[num_written:]

        yield append
        with write_errors_named(path):
            os.fsync(file.fileno())
    blocks.end()
    hashes[path.name] = blocks.digests


@contextlib.contextmanager
def write_errors_named(path: Path) -> Iterator[None]:
    """Turns the file system's refusal to write into InputError."""
    try:
        yield
    except OSError as error:
        expected = f"a folder that can be written and has space ({error.strerror})"
        raise InputError("DataConfig.cache_directory", str(path), expected) from error
