"""A corpus from raw text: what is kept, in any order, by any number of processes, after a kill."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxscale.data import filtered_chunks
from jaxscale.data.build_corpus import build_corpus
from jaxscale.data.filtered_chunks import CorpusPart
from jaxscale.data.filters import Japanese, KanaLines, Keywords, Length
from jaxscale.data.sources import ChatDocument, Document, JsonLinesSource
from jaxscale.types import InputError, RunError
from tests.data import write_corpus

SCRIPT = pathlib.Path(write_corpus.__file__)
ROOT = SCRIPT.parents[2]
WORDS = (
    "吾輩は",
    "猫である",
    "名前は",
    "まだ無い",
    "どこで",
    "生れたか",
    "とんと",
    "見当が",
    "つかぬ",
)


def text_of(number, length=40):
    chosen = random.Random(number)
    return "".join(chosen.choice(WORDS) for _ in range(length)) + f"{number}。"


TEXTS = [text_of(number) for number in range(30)]
# Known duplicates: three equal texts, and two with a letter or a line end more.
COPIES = [TEXTS[3], TEXTS[3], TEXTS[4] + "\n", "「" + TEXTS[5]]
DROPPED = ["English text without any kana in it", "短い"]


def write_lines(folder, documents, num_files=3):
    folder.mkdir()
    for number in range(num_files):
        lines = [json.dumps(each) + "\n" for each in documents[number::num_files]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return str(folder)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Files of raw text, in several chunks; waiting for the disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(filtered_chunks, "CHUNK_CHARACTERS", write_corpus.CHUNK_CHARACTERS)
    texts = TEXTS + COPIES + DROPPED
    documents = [{"text": text, "id": f"d{number}"} for number, text in enumerate(texts)]
    return write_lines(tmp_path / "raw", documents)


def part_of(folder, name="texts", filters=(Length(10), Japanese())):
    return CorpusPart(name, JsonLinesSource((folder,), key_field="id"), filters)


def built(folder, directory, **fields):
    return build_corpus(parts=(part_of(folder),), directory=str(directory), **fields)


def content(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


def texts_of(directory):
    return [each.text for each in JsonLinesSource((str(directory),), key_field="key").documents()]


def test_duplicates_are_out_and_everything_else_is_kept(raw, tmp_path, capsys):
    report = built(raw, tmp_path / "corpus")
    kept = texts_of(tmp_path / "corpus")
    assert len(kept) == len(set(kept)) == len(TEXTS)
    assert {text for text in kept if text not in COPIES} >= set(TEXTS[:3] + TEXTS[6:])
    for copies in ((TEXTS[3],), (TEXTS[4], COPIES[2]), (TEXTS[5], COPIES[3])):
        assert len(set(copies) & set(kept)) == 1
    steps = {step["step"]: step for step in report["parts"]["texts"]}
    assert [steps[name]["documents"] for name in steps] == [36, 35, 34, 32, 30]
    assert steps["near duplicates"]["characters"] == sum(map(len, kept))
    assert steps["read"]["characters"] == sum(map(len, TEXTS + COPIES + DROPPED))
    (example,) = steps["Japanese"]["examples"]
    assert example["text"] == DROPPED[0] and example["key"] == "d34"
    assert example["reason"] == "no kana in the first 50 characters"
    assert steps["Length"]["examples"][0]["reason"] == "characters 2 < 10"
    printed = capsys.readouterr().out
    assert "near duplicates         30        2" in printed and report["fingerprint"] in printed
    lines = (tmp_path / "corpus/duplicates.ndjson").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    groups = {"d3": "equal", "d30": "equal", "d31": "equal", "d4": "4", "d32": "4", "d5": "5"}
    groups["d33"] = "5"
    for pair in pairs:
        key, kept_key = (pair[name].removeprefix("texts/") for name in ("key", "kept"))
        assert groups[key] == groups[kept_key] and key != kept_key
        assert pair["is_equal"] is (groups[key] == "equal")
    assert len(pairs) == 4
    assert not list(tmp_path.glob(".corpus*/"))  # the chunks are removed


def test_a_second_part_gives_way_to_the_first(raw, tmp_path):
    write_lines(tmp_path / "other", [{"text": text, "id": text[:9]} for text in TEXTS[:8]], 1)
    other = part_of(str(tmp_path / "other"), "other", (Length(),))
    for parts in ((other, part_of(raw)), (part_of(raw), other)):
        directory = tmp_path / f"first_{parts[0].name}"
        report = build_corpus(parts=parts, directory=str(directory))
        documents = {name: steps[-1]["documents"] for name, steps in report["parts"].items()}
        expected = {"other": 8, "texts": 22} if parts[0] is other else {"texts": 30, "other": 0}
        assert documents == expected
        assert len(texts_of(directory / "texts")) == documents["texts"]


def test_the_order_of_the_files_does_not_matter(raw, tmp_path):
    """Other names, other lines in each file: the same documents, report and examples."""
    report = built(raw, tmp_path / "corpus")
    lines = [line for path in pathlib.Path(raw).iterdir() for line in path.read_text().splitlines()]
    random.Random(1).shuffle(lines)
    write_lines(tmp_path / "shuffled", [json.loads(line) for line in lines], 4)
    shuffled = built(str(tmp_path / "shuffled"), tmp_path / "again")
    assert sorted(texts_of(tmp_path / "again")) == sorted(texts_of(tmp_path / "corpus"))
    assert shuffled["fingerprint"] == report["fingerprint"]
    assert shuffled["parts"] == report["parts"]


@dataclasses.dataclass(frozen=True)
class Deadly:
    """A filter that ends its process when a file is there."""

    path: str

    def objection(self, document):
        if pathlib.Path(self.path).exists() and document.text == TEXTS[20]:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
@pytest.mark.processes
def test_a_process_that_is_killed_is_told_and_costs_its_chunk_alone(raw, tmp_path):
    flag = tmp_path / "flag"
    flag.touch()
    part = part_of(raw, filters=(Deadly(str(flag)),))
    arguments = {"parts": (part,), "directory": str(tmp_path / "corpus"), "num_processes": 2}
    with pytest.raises(RunError, match="a process that filters was killed"):
        build_corpus(**arguments)
    assert not (tmp_path / "corpus").exists()
    flag.unlink()
    resumed = build_corpus(**arguments | {"num_processes": 1})
    clean = build_corpus(**arguments | {"directory": str(tmp_path / "clean"), "num_processes": 1})
    assert resumed == clean
    assert content(tmp_path / "corpus") == content(tmp_path / "clean")


def start(raw, directory, stage):
    words = [sys.executable, SCRIPT, raw, directory, stage]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def is_running(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill(process):
    """Kills it and returns the pid of one that filters, which it may be itself."""
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    return pid


def assert_ends(pid):
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.processes
@pytest.mark.parametrize(
    "stage",
    ["filter", *(pytest.param(each, marks=pytest.mark.long) for each in ("cluster", "write"))],
)
def test_a_run_that_is_killed_goes_on_to_the_same_corpus(raw, tmp_path, stage):
    """Within a chunk, and after all of them; nothing is there as a corpus before the end."""
    process = start(raw, tmp_path / "corpus", stage)
    write_corpus.build(raw, str(tmp_path / "clean"))
    num_chunks = len(list((tmp_path / "clean/texts").iterdir()))
    assert_ends(kill(process))
    assert not (tmp_path / "corpus").exists()
    (work,) = tmp_path.glob(".corpus.*/texts")
    done = [path.name for path in work.glob("0*")]
    assert len(done) == (2 if stage == "filter" else num_chunks) and num_chunks > 3
    assert [path.name for path in work.glob(".0*")] == [".00002"] * (stage == "filter")
    with chunks_written() as written:
        write_corpus.build(raw, str(tmp_path / "corpus"))
    assert sorted(done + written) == [f"{number:05}" for number in range(num_chunks)]
    assert content(tmp_path / "corpus") == content(tmp_path / "clean")


@contextlib.contextmanager
def chunks_written():
    """The names of the chunks that are filtered within the context."""
    names, write_chunk = [], filtered_chunks._write_chunk

    def spy(folder, *rest):
        names.append(folder.name)
        write_chunk(folder, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtered_chunks, "_write_chunk", spy)
        yield names


@pytest.mark.long
@pytest.mark.processes
def test_processes_that_filter_end_with_the_one_that_started_them(raw, tmp_path):
    assert_ends(kill(start(raw, tmp_path / "corpus", "processes")))


def test_an_interrupted_run_goes_on_from_its_chunks(raw, tmp_path, monkeypatch):
    """Three times, at later and later stages, and then it comes to its end."""
    built(raw, tmp_path / "clean")
    for stage in ("firsts_of_clusters", "_write_documents", "_write_duplicates"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"jaxscale.data.build_corpus.{stage}", interrupted)
            built(raw, tmp_path / "corpus")
        assert not (tmp_path / "corpus").exists()
        monkeypatch.setattr(filtered_chunks, "_write_chunk", interrupted)
    built(raw, tmp_path / "corpus")
    assert content(tmp_path / "corpus") == content(tmp_path / "clean")


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_a_chunk_that_is_not_whole_is_made_again(raw, tmp_path, monkeypatch, caplog):
    """One that was cut short, one with a bit flipped, one without facts, and half of a folder."""
    built(raw, tmp_path / "clean")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jaxscale.data.build_corpus._write", interrupted)
        built(raw, tmp_path / "corpus")
    (work,) = tmp_path.glob(".corpus.*/texts")
    cut, flipped = (work / name / "band_keys" for name in ("00000", "00001"))
    cut.write_bytes(cut.read_bytes()[:-8])
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    (work / "00002" / "facts.json").unlink()
    (work / "00003").rename(work / ".00003")
    (work / ".00003" / "band_keys").unlink()
    with chunks_written() as written:
        built(raw, tmp_path / "corpus")
    assert written == ["00000", "00001", "00002", "00003"]
    assert content(tmp_path / "corpus") == content(tmp_path / "clean")
    damaged = [record.getMessage() for record in caplog.records if "is damaged" in record.message]
    assert len(damaged) == 3 and "band_keys is damaged" in damaged[0]


def test_a_finished_corpus_is_reported_and_another_one_is_refused(raw, tmp_path, capsys):
    report = built(raw, tmp_path / "corpus")
    before = content(tmp_path / "corpus")
    assert built(raw, tmp_path / "corpus", num_processes=2) == report
    other = dataclasses.replace(part_of(raw), filters=(Length(11), Japanese()))
    with pytest.raises(InputError, match="it was built from others"):
        build_corpus(parts=(other,), directory=str(tmp_path / "corpus"))
    with (pathlib.Path(raw) / "0.jsonl").open("a") as file:
        file.write(json.dumps({"text": "新しい", "id": "new"}) + "\n")
    with pytest.raises(InputError, match="it was built from others"):
        built(raw, tmp_path / "corpus")
    assert content(tmp_path / "corpus") == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="expected a new folder"):
        built(raw, tmp_path / "mine")


def test_a_changed_list_of_keywords_is_another_corpus(raw, tmp_path):
    words = tmp_path / "words"
    words.write_text("猫\n")
    part = part_of(raw, filters=(Keywords(str(words), 3),))
    build_corpus(parts=(part,), directory=str(tmp_path / "corpus"))
    words.write_text("犬\n")
    with pytest.raises(InputError, match="it was built from others"):
        build_corpus(parts=(part,), directory=str(tmp_path / "corpus"))


def test_edits_count_what_they_leave(raw, tmp_path):
    part = part_of(raw, filters=(KanaLines(), Length(10)))
    report = build_corpus(parts=(part,), directory=str(tmp_path / "corpus"))
    steps = {step["step"]: step for step in report["parts"]["texts"]}
    assert steps["KanaLines"]["documents"] == 35
    assert steps["KanaLines"]["characters"] == sum(map(len, TEXTS + COPIES)) - 1 + len("短い")
    assert steps["KanaLines"]["examples"][0]["reason"] == "nothing is left"
    assert collections.Counter(text[-1] for text in texts_of(tmp_path / "corpus")) == {"。": 30}


@dataclasses.dataclass(frozen=True)
class Given:
    """Documents given by hand."""

    texts: tuple

    def documents(self):
        chat = ChatDocument("chat", "hello", ())
        return iter([chat] if not self.texts else [Document("key", text) for text in self.texts])

    def version(self):
        return []


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"parts": ()}, "parts"),
        ({"parts": (CorpusPart("a", Given(("x",))), CorpusPart("a", Given(("y",))))}, "parts"),
        ({"parts": (CorpusPart("a", Given(("x",)), (Length(2),)),)}, "parts: .*filters leave one"),
        ({"parts": (CorpusPart("a", Given(())),)}, "CorpusPart.source of a"),
        ({"num_processes": 0}, "num_processes"),
    ],
)
def test_bad_arguments_are_named(tmp_path, fields, parameter):
    defaults = {"parts": (CorpusPart("a", Given(("x",))),), "directory": str(tmp_path / "corpus")}
    with pytest.raises(InputError, match=parameter):
        build_corpus(**defaults | fields)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("name", ["", "../a", "a/b", "."])
def test_a_part_s_name_is_that_of_a_folder(name):
    with pytest.raises(InputError, match=r"CorpusPart\.name"):
        CorpusPart(name, Given(("x",)))
