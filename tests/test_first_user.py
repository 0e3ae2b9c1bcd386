"""What a first user types: the README's commands in their order, then the example files."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from experiments import main_job
from jaxscale.train.metrics import read_history
from tests.test_readme import README

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable, "-m", "jaxscale"]
EXAMPLES = "experiments/configs/examples"
SHORT = ["train.steps=6", "train.evaluate_every=3", "optimizer.warmup_steps=1"]
SHORT_MAIN_JOB = """
include 'main_job.gin'
from __gin__ import dynamic_registration
from jaxscale import run
run.TrainConfig.steps = 12
run.TrainConfig.evaluate_every = 6
run.OptimizerConfig.warmup_steps = 2
run.BitsPerByte.max_batches = 2
"""
SMALL_ENGINE = [
    "port=0",
    "warm_up=False",
    "engine.token_budget=16",
    "engine.max_sequences=4",
    "engine.block_size=8",
    "engine.max_prompts=4",
    "engine.num_blocks=32",
]
NOT_HERE = ("make test",)  # starts the tests


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """What a clone has that the commands read; they write beside it."""
    for name in ("docs", "Makefile", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    runs = tmp_path / "experiments/configs/runs"
    (runs / "short.gin").write_text(SHORT_MAIN_JOB)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def readme_lines():
    """The commands of the README, without its comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]


def run(*words, settings=()):
    """Runs one command, which must succeed; returns what it prints."""
    command = [*PYTHON, *words, *(f"--set={setting}" for setting in settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def serve(*words):
    """Starts a server, asks it for its models, and stops it as a service manager would."""
    command = [*PYTHON, *words, *(f"--set={setting}" for setting in SMALL_ENGINE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        with urllib.request.urlopen(f"{address}/models", timeout=60) as answer:
            assert json.load(answer)["data"][0]["id"] == "main_job"
        server.send_signal(signal.SIGTERM)
    assert server.returncode in (0, 128 + signal.SIGTERM)


def train_main_job(checkout, monkeypatch):
    """`make train`, with twelve steps, of which nothing better than a bigram is expected."""
    monkeypatch.setattr(main_job, "FILE", "experiments/configs/runs/short.gin")
    monkeypatch.setattr(main_job, "compare_with_ngrams", lambda *args, **named: "")
    main_job.main()
    assert len(read_history(checkout / "runs/main_job/metrics.jsonl")) >= 12


def write_texts(folder):
    """Modules of the standard library as JSON lines and as Parquet."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data`")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [path.read_text() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:120]]
    (folder / "web").mkdir()
    (folder / "books").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:60])
    (folder / "web" / "a.jsonl").write_text(lines)
    parquet.write_table(pyarrow.table({"text": texts[60:]}), folder / "books" / "a.parquet")


def write_raw(folder):
    """What a corpus is made of: pages and articles in Japanese, and code."""
    pages = [f"{number}番目の吾輩は猫である。名前はまだ無い。\n" * 20 for number in range(40)]
    code = [path.read_text() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:120]]
    for name, texts in (("pages", pages), ("encyclopedia", pages[:20]), ("code", code)):
        lines = [
            {"text": text, "url": f"https://example.com/{number}"}
            for number, text in enumerate(texts)
        ]
        (folder / "raw" / name).mkdir(parents=True)
        (folder / "raw" / name / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.long
def test_the_readme_and_the_examples_run_in_their_order(checkout, monkeypatch, capfd):
    lines = readme_lines()
    assert len(lines) > 10
    for line in lines:
        verb, *words = shlex.split(line)
        if line in NOT_HERE:
            assert (
                subprocess.run([verb, "-n", *words], cwd=ROOT, capture_output=True).returncode == 0
            )
        elif line == "make train":
            train_main_job(checkout, monkeypatch)
        elif words[0] == "serve":
            serve(*words)
        else:
            printed = run(*words, settings=SHORT if words[0] == "pretrain" else ())
            assert "nothing to do" not in printed, line
    assert {"main_job", "zero3", "again"} <= {path.name for path in Path("runs").iterdir()}

    write_texts(checkout)
    for name, texts in (("json_lines", "web"), ("parquet", "books")):
        file, settings = f"{EXAMPLES}/{name}.gin", [f"TEXTS=('{texts}',)"]
        run("tokenizer", file, settings=settings)
        assert "documents" in run("data", file, settings=settings)
    write_raw(checkout)
    assert "fingerprint" in run("corpus", f"{EXAMPLES}/corpus.gin")
    run("tokenizer", f"{EXAMPLES}/corpus.gin")
    run("pretrain", f"{EXAMPLES}/corpus.gin", settings=SHORT)
    for name in ("mixture", "sentencepiece"):
        run("tokenizer", f"{EXAMPLES}/{name}.gin")
        run("pretrain", f"{EXAMPLES}/{name}.gin", settings=SHORT)
    run("pretrain", f"{EXAMPLES}/profile.gin", settings=[*SHORT, "train.profile_steps=(3, 4)"])
    assert list(Path("runs/profile/profile").rglob("*.xplane.pb"))
    run("pretrain", f"{EXAMPLES}/fine_tune.gin", settings=SHORT)
    tuned, main = (
        read_history(Path("runs") / name / "metrics.jsonl") for name in ("fine_tune", "main_job")
    )
    assert tuned[0]["loss"] < main[0]["loss"], "it starts from what was learned"
    subprocess.run([sys.executable, "experiments/preferences/parity.py", "runs/parity"], check=True)
    run("pretrain", f"{EXAMPLES}/parity_chats.gin", settings=SHORT)
    assert "tasks/parity/char_f1" in run("evaluate", f"{EXAMPLES}/tasks.gin")
    run("pretrain", "experiments/configs/papers/reward_cpu.gin", settings=SHORT)
    run("adapt", "runs/parity_chats", "runs/parity_adapted", settings=["lora.rank=8"])
    run("pretrain", f"{EXAMPLES}/ppo.gin", settings=SHORT)
    assert "value_loss" in read_history(Path("runs/ppo/metrics.jsonl"))[0]
    names = {
        "json_lines",
        "parquet",
        "corpus",
        "mixture",
        "sentencepiece",
        "profile",
        "fine_tune",
        "parity_chats",
        "ppo",
        "tasks",
    }
    assert {path.stem for path in Path(EXAMPLES).glob("*.gin")} == names, "each example is run"
