"""A folder in an object store, as far as reading a checkpoint asks for one."""

import dataclasses
import io
from typing import Any

import tensorstore as ts

from jaxscale.checkpoint.mirror import MARKER, MirrorConfig, store_errors_named


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """A place in a store, with the methods of pathlib.Path that readers call.

    Args:
        url: of the place, for messages.
        kvstore: the place as tensorstore opens it; its path ends in "/" unless it is empty.
    """

    url: str
    kvstore: dict[str, Any]

    @classmethod
    def of(cls, url: str) -> "RemotePath":
        """The place at "s3://BUCKET/PATH" or "gs://BUCKET/PATH".

        Raises:
            InputError: it is neither.
        """
        config = MirrorConfig.of_environment(url)
        return cls(url.rstrip("/"), config.spec())

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.url.rsplit("/", 1)[-1]

    def __truediv__(self, name: str) -> "RemotePath":
        inner = self.kvstore | {"path": f"{self.kvstore['path']}{name}/"}
        return RemotePath(f"{self.url}/{name}", inner)

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self._read().state == "value"

    def open(self, _mode: str) -> io.BytesIO:
        """Its content."""
        return io.BytesIO(self._content())

    def read_text(self) -> str:
        """Its content, which is text."""
        return self._content().decode()

    def committed_steps(self) -> list[int]:
        """The steps below it that are whole, in ascending order."""
        with store_errors_named(self.url):
            keys = [key.decode() for key in self._store().list().result()]
        parts = [key.split("/") for key in keys]
        return sorted(
            int(names[0]) for names in parts if names[0].isdecimal() and names[1:] == [MARKER]
        )

    def is_committed(self) -> bool:
        """Whether it is a whole step."""
        return (self / MARKER).is_file()

    def _content(self) -> bytes:
        found = self._read()
        if found.state != "value":
            raise FileNotFoundError(f"{self.url} is missing")
        return found.value

    def _read(self) -> Any:
        # An object's name has no "/" at its end.
        named = self.kvstore | {"path": self.kvstore["path"].rstrip("/")}
        with store_errors_named(self.url):
            return ts.KvStore.open(named).result().read("").result()

    def _store(self) -> Any:
        return ts.KvStore.open(self.kvstore).result()
