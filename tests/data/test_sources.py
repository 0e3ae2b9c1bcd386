"""Sources: what they yield, in which order, and what they say about bad input."""

import gzip
import json
import os
import struct
import sys
import time

import pytest
import zstandard

from jaxscale.data import files
from jaxscale.data.sources import (
    HuggingFaceSource,
    JsonLinesSource,
    ParquetSource,
    StandardLibrary,
    TextSource,
)
from jaxscale.types import InputError

ROWS = [{"id": f"key-{n}", "text": f"text {n} é\n\n漢", "other": n} for n in range(5)]
EXPECTED = [(row["id"], row["text"]) for row in ROWS]


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def frames(content: bytes) -> bytes:
    """Two zstd frames in one file, as parallel compressors write them."""
    compress = zstandard.ZstdCompressor().compress
    return compress(content[:100]) + compress(content[100:])


def test_text_files_come_in_the_order_of_their_keys(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c.md", "skipped/d.txt", "B.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    folder = TextSource(paths=(str(tmp_path),), patterns=("*.txt",), excluded=("skip*",))
    assert list(folder.documents()) == [
        (name, f"{name}\r\n") for name in ("B.txt", "a/z.txt", "b.txt")
    ]
    single = TextSource(paths=(str(tmp_path / "a" / "c.md"),))
    assert list(single.documents()) == [("c.md", "a/c.md\r\n")]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    for path in ("~", "~/a.txt"):
        assert list(TextSource(paths=(path,)).documents()) == [("a.txt", "a")]


def test_linked_folders_are_searched_once_whatever_they_link_to(tmp_path):
    for name in ("corpus", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "corpus")
    source = TextSource(paths=(str(tmp_path / "corpus"),))
    assert [key for key, _ in source.documents()] == ["corpus.txt", "link/elsewhere.txt"]
    (tmp_path / "corpus" / "broken.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"broken\.txt.*can be read"):
        source.version()


def test_version_changes_with_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source = TextSource(paths=(str(tmp_path),))
    before = source.version()
    assert source.version() == before
    (tmp_path / "a.txt").write_text("two!")
    assert source.version() != before


def test_standard_library_is_the_interpreters_own():
    documents = dict(StandardLibrary(excluded=("[a-z]*",)).documents())
    assert documents["abc.py"].startswith("# Copyright")
    assert not any(key.startswith("json/") for key in documents)


def long_window(content: bytes) -> bytes:
    """As `zstd --long=31` writes it, without the size of the content."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=31, enable_ldm=True, write_content_size=False
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


def after_a_skippable_frame(content: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A50, 4) + b"size" + frames(content)


COMPRESSIONS = [bytes, gzip.compress, frames, long_window, after_a_skippable_frame]


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_json_lines_whatever_the_compression_or_name(tmp_path, compress):
    path = tmp_path / "data.bin"
    path.write_bytes(compress(lines() + b"\n"))
    source = JsonLinesSource(paths=(str(path),), key_field="id")
    assert list(source.documents()) == EXPECTED
    assert next(JsonLinesSource(paths=(str(path),)).documents()).key == "data.bin:1"


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines())
    assert list(JsonLinesSource(paths=(str(path),), key_field="id").documents()) == EXPECTED


def test_a_long_line_takes_time_in_proportion(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 10)
    text = "x" * (1 << 23)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text + end}) + "\n" for end in "ab"))
    begin = time.monotonic()
    found = [document.text[-1] for document in JsonLinesSource((str(path),)).documents()]
    assert found == ["a", "b"]
    assert time.monotonic() - begin < 3


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    assert list(ParquetSource(paths=(str(tmp_path),), key_column="id").documents()) == EXPECTED
    with pytest.raises(InputError, match="a column 'body'"):
        next(ParquetSource(paths=(str(tmp_path),), text_column="body").documents())
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match="a Parquet file"):
        list(ParquetSource(paths=(str(tmp_path / "b.parquet"),)).documents())


def invert(path, first, last):
    content = bytearray(path.read_bytes())
    content[first:last] = bytes(byte ^ 255 for byte in content[first:last])
    path.write_bytes(content)


@pytest.mark.parametrize("compression", ["snappy", "none"])
@pytest.mark.parametrize("bytes_", [(10, 30), (200, 900), (-300, -150)], ids=str)
def test_a_damaged_parquet_file_is_named(tmp_path, compression, bytes_):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"text": f"{n * n} é" * 9} for n in range(99)])
    parquet.write_table(table, path, compression=compression)
    source = ParquetSource((str(path),))
    assert len(list(source.documents())) == 99
    invert(path, *bytes_)
    with pytest.raises(
        InputError, match=r"ParquetSource\.paths: given '.*a\.parquet', .* whole \("
    ):
        list(source.documents())


def test_a_damaged_dataset_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS * 99).save_to_disk(tmp_path / "dataset")
    source = HuggingFaceSource(directory=str(tmp_path / "dataset"))
    (data,) = (tmp_path / "dataset").glob("*.arrow")
    state = tmp_path / "dataset" / "state.json"
    whole = data.read_bytes()
    damages = [(data, whole[: len(whole) // 2]), (data, whole[:-99]), (data, b""), (state, b"{}")]
    for path, content in damages:
        path.write_bytes(content)
        for read in (source.version, lambda: list(source.documents())):
            with pytest.raises(InputError, match=r"HuggingFaceSource: given '.*dataset', expected"):
                read()
        data.write_bytes(whole)
    with pytest.raises(InputError, match=r"HuggingFaceSource: given '', expected a dataset"):
        HuggingFaceSource(name="").version()


def test_hugging_face_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "parts")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(lines())
    plain = HuggingFaceSource(directory=str(tmp_path / "plain"), key_column="id")
    parts = HuggingFaceSource(directory=str(tmp_path / "parts"), key_column="id")
    named = HuggingFaceSource(name=str(tmp_path / "files"), key_column="id")
    for source in (plain, parts, named):
        assert list(source.documents()) == EXPECTED
        assert source.version() == source.version()
    with pytest.raises(InputError, match="one of train"):
        next(HuggingFaceSource(directory=str(tmp_path / "parts"), split="test").documents())
    with pytest.raises(InputError, match="a dataset"):
        next(HuggingFaceSource(directory=str(tmp_path / "none")).documents())


@pytest.mark.parametrize(
    "source", [ParquetSource(paths=(__file__,)), HuggingFaceSource(directory="x")]
)
def test_missing_extra_is_named(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"jaxscale\[data\]"):
        next(source.documents())


def test_missing_file_and_folder_without_matches(tmp_path):
    with pytest.raises(InputError, match="exists"):
        next(TextSource(paths=(str(tmp_path / "none"),)).documents())
    with pytest.raises(InputError, match=r"matches \*.txt"):
        next(TextSource(paths=(str(tmp_path),)).documents())


SOURCES = {TextSource: "a.txt", JsonLinesSource: "a.jsonl", ParquetSource: "a.parquet"}


@pytest.mark.parametrize(("source", "name"), SOURCES.items())
def test_a_pipe_is_named_and_not_waited_for(tmp_path, source, name):
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=rf"{name}', expected a regular file, no pipe"):
            source((str(path),)).version()


@pytest.mark.parametrize("source", SOURCES)
def test_a_name_too_long_for_a_file_is_named(tmp_path, source):
    path = tmp_path / ("n" * 300)
    with pytest.raises(InputError, match=r"nnn', .*that can be read \(File name too long"):
        next(source((str(path),)).documents())


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"bad\.txt.*UTF-8"):
        next(TextSource(paths=(str(tmp_path),)).documents())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"x\.jsonl:2: .*one JSON object per line"),
        (b"[1]\n", "a JSON object"),
        (b"[" * 100_000 + b"\n", "one JSON object per line"),
        (b'{"body": "a"}\n', "a field 'text'"),
        (b'{"text": null}\n', "a string"),
        (gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:40], "a whole compressed file"),
        (zstandard.ZstdCompressor().compress(lines())[:-1], "a whole compressed file"),
        (
            zstandard.ZstdCompressor().compress(lines()) + b"more",
            r"can be read \(.*[Uu]nknown frame",
        ),
    ],
)
def test_bad_json_lines_are_named(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(JsonLinesSource(paths=(str(path),)).documents())


def test_wrong_types_are_refused():
    with pytest.raises(InputError, match=r"TextSource\.paths"):
        TextSource(paths="folder")
    with pytest.raises(InputError, match="exactly one"):
        HuggingFaceSource()
