"""From raw files to a training step, by the command line."""

import json

import pytest

from jaxscale import cli
from jaxscale.data import filtered_chunks
from jaxscale.data.sources import JsonLinesSource
from tests.run import runs

GIN = """
from __gin__ import dynamic_registration
from jaxscale import run
from jaxscale.data import build_corpus
include '{root}/tests/tiny.gin'
build_corpus.build_corpus.directory = %CLEAN
build_corpus.build_corpus.parts = (@pages/run.CorpusPart(), @notes/run.CorpusPart())
pages/run.CorpusPart.name = 'pages'
pages/run.CorpusPart.source = @run.JsonLinesSource()
pages/run.CorpusPart.filters = (@run.Japanese(), @long/run.Length(), @run.KanaLines())
run.JsonLinesSource.paths = ('{folder}/pages.jsonl',)
long/run.Length.at_least = 20
notes/run.CorpusPart.name = 'notes'
notes/run.CorpusPart.source = @notes/run.TextSource()
notes/run.TextSource.paths = ('{folder}/notes',)
run.MinHash.num_bands = 10
CLEAN = '{folder}/clean'
CORPUS = ()
run.DataConfig.sources = (@clean/run.JsonLinesSource(),)
clean/run.JsonLinesSource.paths = (%CLEAN,)
clean/run.JsonLinesSource.key_field = 'key'
CACHE = '{folder}/cache'
DIRECTORY = '{folder}/run'
"""


@pytest.mark.processes
def test_raw_files_become_a_corpus_that_is_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(filtered_chunks, "CHUNK_CHARACTERS", 300)  # several chunks
    pages = [
        f"{number}番目の吾輩は猫である。{number * 37}匹の名前はまだ無い。" for number in range(40)
    ]
    lines = [*pages, *pages[:5], "No kana, no Japanese, no page.", "短いのは無い"]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "pages.jsonl").write_text(text)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("A note in English.")
    file = tmp_path / "run.gin"
    file.write_text(GIN.format(root=runs.ROOT, folder=tmp_path))
    assert cli.main(["corpus", str(file), "--set=num_processes=2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    figures = {
        tuple(line.split()[:2]): line.split() for line in printed if line[:5] in ("pages", "notes")
    }
    assert figures["pages", "read"][2] == "47"
    assert figures["pages", "Japanese"][2:4] == ["46", "1"]
    assert figures["pages", "Length"][2:4] == ["45", "1"]
    assert figures["pages", "equal"][3:5] == ["40", "5"]
    assert figures["notes", "near"][3:5] == ["1", "0"]
    assert printed[-1].startswith("fingerprint ")
    source = JsonLinesSource((str(tmp_path / "clean"),), key_field="key")
    documents = dict(source.documents())
    assert documents["notes/a.txt"] == "A note in English."
    assert len(documents) == int(figures["pages", "near"][3]) + 1 > 30
    assert set(documents.values()) <= {*pages, "A note in English."}
    again = tmp_path / "again"
    assert cli.main(["corpus", str(file), f"--set=directory={str(again)!r}"]) == 0
    files = [path.relative_to(again) for path in again.rglob("*.*")]
    assert len(files) > 5
    for each in files:  # one process writes the same bytes as two
        assert (again / each).read_bytes() == (tmp_path / "clean" / each).read_bytes()
    arguments = ["--set=train.steps=2", "--set=train.evaluate_every=2"]
    assert cli.main(["pretrain", str(file), *arguments]) == 0
    assert len(runs.losses(tmp_path / "run")) == 2
    assert cli.main(["data", str(file)]) == 0
    assert "JsonLinesSource" in capsys.readouterr().out
