"""The token cache: what it holds, and that it is there whole or not at all."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import pytest

from jaxscale.data import checksums
from jaxscale.data.cache import open_cache
from jaxscale.data.sources import Document, TextSource
from jaxscale.data.split import hash_text
from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.types import InputError

SCRIPT = pathlib.Path(__file__).with_name("write_cache.py")
ROOT = SCRIPT.parents[2]


@dataclasses.dataclass(frozen=True)
class Listed:
    """Documents given by hand."""

    texts: tuple[str, ...]

    def documents(self):
        return (Document(f"key {n}\n", text) for n, text in enumerate(self.texts))

    def version(self):
        return []


def open_listed(directory, *texts):
    return open_cache(Listed(texts), ByteTokenizer(), directory)


def test_holds_the_documents_that_have_text(tmp_path):
    cache = open_listed(tmp_path, "ab", "", "é")
    assert cache.tokens.dtype == np.uint16
    assert cache.tokens.tolist() == [97, 98, 256, 0xC3, 0xA9, 256]
    assert cache.offsets.tolist() == [0, 3, 6]
    assert cache.num_bytes.tolist() == [2, 2]
    assert cache.num_scored_bytes.tolist() == [1, 1]
    assert cache.keys() == ["key 0\n", "key 2\n"]
    assert cache.key_hashes.tolist() == [hash_text("key 0\n"), hash_text("key 2\n")]
    assert cache.text_hashes.tolist() == [hash_text("ab"), hash_text("é")]


@dataclasses.dataclass(frozen=True)
class Keyed:
    """Documents with keys given by hand."""

    keys: tuple[str, ...]

    def documents(self):
        return (Document(key, f"text {n}") for n, key in enumerate(self.keys))

    def version(self):
        return []


def test_one_key_for_many_documents_is_told_and_leaves_nothing(tmp_path):
    message = r"sources: Keyed: given 'wiki', expected a key of its own.*; 2 have this one"
    with pytest.raises(InputError, match=message):
        open_cache(Keyed(("a", "wiki", "b", "wiki")), ByteTokenizer(), tmp_path)
    assert not folders_in(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    cache = open_listed(tmp_path, "\ufeffab", "\ufeff", "a\ufeff")
    assert cache.tokens.tolist() == [97, 98, 256, 97, 0xEF, 0xBB, 0xBF, 256]
    assert cache.text_hashes[0] == hash_text("ab")


def test_each_tokenizer_has_a_cache_of_its_own(tmp_path):
    class Shouting(ByteTokenizer):
        fingerprint = "shouting"

        def encode_batch(self, texts):
            return super().encode_batch([text.upper() for text in texts])

    assert open_listed(tmp_path, "ab").tokens.tolist() == [97, 98, 256]
    assert open_cache(Listed(("ab",)), Shouting(), tmp_path).tokens.tolist() == [65, 66, 256]


def test_large_vocabularies_take_32_bits(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size, eos_id, fingerprint = 70001, 70000, "wide"

    assert open_cache(Listed(("a",)), Wide(), tmp_path).tokens.tolist() == [97, 70000]


def test_is_built_once_and_anew_when_the_text_changes(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source, directory = TextSource(paths=(str(tmp_path),)), tmp_path / "cache"
    first = open_cache(source, ByteTokenizer(), directory)
    tokens = first.directory / "tokens.bin"
    built = tokens.stat().st_mtime_ns
    assert open_cache(source, ByteTokenizer(), directory).directory == first.directory
    assert tokens.stat().st_mtime_ns == built
    (tmp_path / "a.txt").write_text("other")
    assert len(open_cache(source, ByteTokenizer(), directory).tokens) == 6
    assert len(first.tokens) == 4


def test_a_finished_cache_needs_no_right_to_write(tmp_path, monkeypatch):
    open_listed(tmp_path, "a")
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    assert len(open_listed(tmp_path, "a").tokens) == 2


def refuse(path, *arguments, **options):
    raise PermissionError(13, "Permission denied", str(path))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Has the name, fields and version of the source in write_cache.py, and so the same cache."""

    reads: ClassVar[list[str]] = []

    def documents(self):
        self.reads.append("read")
        time.sleep(0.1)  # long enough for a second reader to be seen
        yield Document("key", "text")

    def version(self):
        return []


def test_one_process_builds_while_others_wait_and_take_over_when_it_is_killed(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    Corpus.reads.clear()
    with (
        subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as writer,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        try:
            assert writer.stdout.readline() == b"writing\n"
            (abandoned,) = folders_in(tmp_path)
            assert (abandoned / "tokens.bin").stat().st_size > 0
            arguments = (open_cache, Corpus(), ByteTokenizer(), tmp_path)
            waiting = [pool.submit(*arguments) for _ in range(2)]
            time.sleep(0.3)
            assert not Corpus.reads, "two build at a time"
        finally:
            writer.kill()
        first, second = [future.result() for future in waiting]
    assert Corpus.reads == ["read"]
    assert first.tokens.tolist() == second.tokens.tolist() == [*b"text", 256]
    assert abandoned.name.startswith(f".{first.fingerprint}.")
    assert folders_in(tmp_path) == [first.directory] == [second.directory]


def folders_in(directory):
    return [path for path in directory.iterdir() if path.is_dir()]


def test_another_host_that_was_faster_wins(tmp_path, monkeypatch):
    rename = pathlib.Path.rename

    def rename_second(folder, target):
        """Renames after another host has put the same cache in place."""
        monkeypatch.setattr(pathlib.Path, "rename", rename)
        shutil.copytree(folder, target)
        return rename(folder, target)

    monkeypatch.setattr(pathlib.Path, "rename", rename_second)
    cache = open_listed(tmp_path, "a")
    assert cache.tokens.tolist() == [97, 256]
    assert folders_in(tmp_path) == [cache.directory]


@pytest.fixture
def small_disk(mount_disk):
    return mount_disk("64k")


def test_full_disk_is_named_and_leaves_nothing(small_disk):
    with pytest.raises(InputError, match=r"cache_directory.*has space \(No space left"):
        open_listed(small_disk, "x" * 100_000)
    assert not folders_in(small_disk)
    assert len(open_listed(small_disk, "small").tokens) == 6


def test_error_of_the_system_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="has space"):
        open_listed(tmp_path, "text")
    assert not folders_in(tmp_path)


def test_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache_directory.*a folder that can be written"):
        open_listed(tmp_path / "file" / "cache", "text")


def test_name_too_long_for_a_directory_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cache_directory.*\(File name too long\)"):
        open_listed(tmp_path / ("n" * 300), "text")


def test_empty_corpus_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="the corpus is empty"):
        open_listed(tmp_path, "", "")
    assert not folders_in(tmp_path)


def test_text_with_half_a_character_is_named(tmp_path):
    with pytest.raises(InputError, match="text of whole characters"):
        open_listed(tmp_path, "a\ud800")


def flip(path, first, last=None):
    """Inverts the bytes of a file from `first` to before `last`."""
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[first:last] ^= 255
    path.write_bytes(content.tobytes())


ARRAYS = ["tokens", "offsets", "num_bytes", "num_scored_bytes", "key_hashes", "text_hashes"]
FILES = [*(f"{name}.bin" for name in ARRAYS), "keys.jsonl"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bytes_", [(0, None), (3, 4)], ids=["all bytes", "one byte"])
def test_flipped_bytes_are_told(tmp_path, name, bytes_):
    folder = open_listed(tmp_path, "text", "more").directory
    flip(folder / name, *bytes_)
    with pytest.raises(InputError, match=rf"delete it \({name} has changed .*bytes 0 to"):
        open_listed(tmp_path, "text", "more")


def test_a_manifest_that_says_something_else_is_told(tmp_path):
    path = open_listed(tmp_path, "text").directory / "manifest.json"
    path.write_text(path.read_text().replace("uint16", "uint32"))
    with pytest.raises(InputError, match=r"manifest\.json has changed"):
        open_listed(tmp_path, "text")


def test_a_large_cache_is_sampled_and_compared_whole_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 1000)
    texts = ("x" * 500,) * 40  # two bytes a token
    opened = functools.partial(open_cache, Listed(texts), ByteTokenizer(), tmp_path)
    path = opened(is_verified=True).directory / "tokens.bin"
    flip(path, 30_500, 30_501)
    is_found = []
    for _ in range(30):
        try:
            opened()
        except InputError:
            is_found.append(True)
        else:
            is_found.append(False)
    assert any(is_found) and not all(is_found), "other blocks each time: 16 of 40"
    with pytest.raises(InputError, match=r"tokens\.bin has changed .* in bytes 30000 to 30999"):
        opened(is_verified=True)


@pytest.mark.parametrize("damage", ["shorten", "remove", "manifest"])
def test_damaged_cache_is_named(tmp_path, damage):
    folder = open_listed(tmp_path, "text").directory
    if damage == "shorten":
        os.truncate(folder / "tokens.bin", 4)
    elif damage == "remove":
        (folder / "offsets.bin").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"a whole cache.*delete it"):
        open_listed(tmp_path, "text")
