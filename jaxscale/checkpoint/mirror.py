"""Committed steps in an object store, S3 or GCS: what survives the machine that trained.

A store has no rename. So a step's files are uploaded first and its marker last; a step without a
marker does not exist. Where the marker of a step is deleted first, it is gone before its files are.
"""

import concurrent.futures
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import tensorstore as ts

from jaxscale.checkpoint import manifest
from jaxscale.checkpoint.steps import Keeping
from jaxscale.types import InputError, check_types

logger = logging.getLogger(__name__)

MARKER = "COMMITTED"
SCHEMES = {"s3": "s3", "gs": "gcs"}
UNFINISHED = ".download"
MAX_FILES = 8  # under way at once; a file is at most a chunk of a leaf
POLL_S = 0.1


@dataclasses.dataclass(frozen=True)
class MirrorConfig:
    """Where committed steps are copied to.

    Args:
        url: "s3://BUCKET/PATH" or "gs://BUCKET/PATH". Credentials are those of the environment, as
            the store's own tools take them.
        endpoint: of a store that is compatible with S3, such as "http://127.0.0.1:9000"; None for
            the store's own.
        region: of an S3 bucket; None to ask the store.
    """

    url: str
    endpoint: str | None = None
    region: str | None = None

    def __post_init__(self):
        check_types(self)
        scheme, separator, place = self.url.partition("://")
        if scheme not in SCHEMES or not separator or not place.strip("/"):
            raise InputError("MirrorConfig.url", self.url, "s3://BUCKET/PATH or gs://BUCKET/PATH")

    @classmethod
    def of_environment(cls, url: str) -> "MirrorConfig":
        """The store at a URL; endpoint and region are those of the variables that AWS's tools read.

        They are AWS_ENDPOINT_URL and AWS_REGION.
        """
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        return cls(url, endpoint=endpoint, region=os.environ.get("AWS_REGION"))

    def spec(self) -> dict[str, Any]:
        """The store as tensorstore opens it."""
        scheme, _, place = self.url.partition("://")
        bucket, _, path = place.strip("/").partition("/")
        spec = {"driver": SCHEMES[scheme], "bucket": bucket, "path": f"{path}/" if path else ""}
        given = {"endpoint": self.endpoint, "aws_region": self.region}
        return spec | {name: value for name, value in given.items() if value is not None}


class Mirror:
    """The steps of one run in an object store; used by its first process alone.

    Args:
        config: where.
        directory: of the run's checkpoints.
    """

    def __init__(self, config: MirrorConfig, directory: pathlib.Path):
        self._config = config
        self._directory = directory
        with self._errors_named():
            self._store = ts.KvStore.open(config.spec()).result()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._uploading: concurrent.futures.Future | None = None
        self._is_given_up = threading.Event()

    def follow(self, step: int, keeping: Keeping) -> None:
        """Uploads a step once it is committed, and then deletes what need not be kept."""
        self._is_given_up.clear()
        self._uploading = self._thread.submit(self._follow, step, keeping)

    def wait(self, *, is_committed: bool) -> None:
        """Returns once the last step is uploaded, or at once if it will never be committed.

        Raises:
            InputError: the store refuses.
        """
        uploading, self._uploading = self._uploading, None
        if uploading is None:
            return
        if not is_committed:
            self._is_given_up.set()
        uploading.result()

    def steps(self) -> dict[int, datetime.datetime]:
        """The steps that are whole, and when they were written."""
        with self._errors_named():
            keys = [key.decode() for key in self._store.list().result()]
            found = {}
            for key in keys:
                step, _, name = key.partition("/")
                if name == MARKER and step.isdecimal():
                    note = json.loads(self._store.read(key).result().value)
                    found[int(step)] = datetime.datetime.fromisoformat(note["time"])
        return dict(sorted(found.items()))

    def fetch_newer(self, here: list[int]) -> None:
        """Fetches the newest step unless one of those that are here is as new."""
        mirrored = list(self.steps())[-1:]
        if mirrored > here[-1:]:
            self._directory.mkdir(parents=True, exist_ok=True)
            self.fetch(mirrored[0])

    def fetch(self, step: int) -> None:
        """Downloads a step into the directory; it is there when it is whole.

        Raises:
            InputError: the store refuses, or a file is not as it was written.
        """
        folder = self._directory / f"{step}{UNFINISHED}"
        shutil.rmtree(folder, ignore_errors=True)
        with self._errors_named():
            keys = [key.decode() for key in self._store.list(self._range(step)).result()]
            names = [key.partition("/")[2] for key in keys]
            for name in names:
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise InputError("MirrorConfig.url", name, "names within a step's folder")

            def read(name: str) -> None:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._store.read(f"{step}/{name}").result().value)

            files = [name for name in names if name != MARKER]
            with concurrent.futures.ThreadPoolExecutor(MAX_FILES) as pool:
                list(pool.map(read, files))
        damage = manifest.find_damage(folder, lambda name: True)
        if damage is not None:
            expected = f"a sound step {step}; {damage}"
            raise InputError("MirrorConfig.url", self._config.url, expected)
        folder.rename(self._directory / str(step))
        logger.info("step %d was fetched from %s", step, self._config.url)

    def close(self) -> None:
        """Releases the thread."""
        self._is_given_up.set()
        self._thread.shutdown()

    def _follow(self, step: int, keeping: Keeping) -> None:
        folder = self._directory / str(step)
        while not folder.exists():
            if self._is_given_up.wait(POLL_S):
                return
        with self._errors_named():
            self._upload(step, folder)
        written = self.steps()
        with self._errors_named():
            for old, is_kept in zip(written, keeping.is_kept(written)):
                if not is_kept:
                    self._delete(old)

    def _upload(self, step: int, folder: pathlib.Path) -> None:
        def write(path: pathlib.Path) -> None:
            name = path.relative_to(folder).as_posix()
            self._store.write(f"{step}/{name}", path.read_bytes()).result()

        files = [path for path in folder.rglob("*") if path.is_file()]
        with concurrent.futures.ThreadPoolExecutor(MAX_FILES) as pool:
            list(pool.map(write, files))
        now = datetime.datetime.now(tz=datetime.UTC)
        note = json.dumps({"time": now.isoformat(), "files": len(files)})
        self._store.write(f"{step}/{MARKER}", note.encode()).result()

    def _delete(self, step: int) -> None:
        self._store.write(f"{step}/{MARKER}", None).result()
        self._store.delete_range(self._range(step)).result()

    def _range(self, step: int) -> Any:
        return ts.KvStore.KeyRange(f"{step}/", f"{step}0")  # "0" comes after "/"

    def _errors_named(self) -> AbstractContextManager[None]:
        return store_errors_named(self._config.url)


@contextmanager
def store_errors_named(url: str) -> Iterator[None]:
    """Turns a store's refusals into InputError."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        expected = f"a store that can be read and written ({error})"
        raise InputError("MirrorConfig.url", url, expected) from error
