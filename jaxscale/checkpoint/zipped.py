"""Where the members of an uncompressed zip archive lie in a file, to be read in part."""

import dataclasses
import io
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from jaxscale.types import InputError

LOCAL_HEADER_BYTES = 30  # of a member; the lengths of its name and extra field are its last 4
BLOCK_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Member:
    """A member of an archive.

    Args:
        offset: of its first byte in the file.
        size: in bytes.
        crc: CRC-32 of its bytes, as the archive has it.
    """

    offset: int
    size: int
    crc: int


class _Window(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, size: int):
        self._file, self._begin, self._size = file, begin, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._begin + self._at)
        size = min(len(buffer), max(0, self._size - self._at))
        data = self._file.read(size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def stored_members(
    path: Path,
    begin: int = 0,
    size: int | None = None,
) -> dict[str, Member]:
    """The members of an archive by name.

    Args:
        path: of the file.
        begin: where the archive begins in it.
        size: bytes of the archive; to the end of the file when None.
    Raises:
        InputError: it is missing or no zip archive, is cut short, or a member is compressed or has
            the name of another.
    """
    if not path.is_file():
        raise InputError("checkpoint", str(path), "a file; there is none")
    size = path.stat().st_size - begin if size is None else size
    with path.open("rb") as file:
        window = _Window(file, begin, size)
        try:
            with zipfile.ZipFile(io.BufferedReader(window)) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise InputError("checkpoint", str(path), f"a sound zip archive ({error})") from error
        found: dict[str, Member] = {}
        for member in members:
            if member.filename in found:
                raise InputError(str(path), member.filename, "one member of that name")
            found[member.filename] = _member(path, file, begin, member)
    return found


def check_archive(path: Path, begin: int = 0, size: int | None = None) -> None:
    """Compares the checksum of each member.

    Args:
        path: as `stored_members`, and so the others.
    Raises:
        InputError: as `stored_members`, or a checksum differs.
    """
    for name, member in stored_members(path, begin, size).items():
        check_member(path, name, member)


def check_member(path: Path, name: str, member: Member) -> None:
    """Raises InputError unless the bytes of a member of an archive are those that were written."""
    crc, left = 0, member.size
    with path.open("rb") as file:
        file.seek(member.offset)
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    if left or crc != member.crc:
        expected = f"that with CRC-32 {member.crc:08x}, as the archive says: it is damaged"
        raise InputError(str(path), name, expected)


def _member(
    path: Path,
    file: BinaryIO,
    begin: int,
    member: zipfile.ZipInfo,
) -> Member:
    if member.compress_type != zipfile.ZIP_STORED:
        expected = "an uncompressed member, of which parts can be read"
        raise InputError(str(path), member.filename, expected)
    header_at = begin + member.header_offset
    if header_at < begin:
        raise InputError(str(path), member.filename, "a sound zip archive")
    file.seek(header_at)
    header = file.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise InputError(str(path), member.filename, "a sound zip archive")
    num_name = int.from_bytes(header[26:28], "little")
    num_extra = int.from_bytes(header[28:30], "little")
    offset = header_at + LOCAL_HEADER_BYTES + num_name + num_extra
    return Member(offset, member.file_size, member.CRC)
