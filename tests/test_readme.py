"""What the README says holds: paths, commands, snippets, and which module has which paper."""

import functools
import re
import shlex
import sysconfig
from pathlib import Path

import pytest

from jaxscale import cli, config
from jaxscale.data.sources import Source
from jaxscale.launch.ahead_of_time import described_devices, has_plugin
from jaxscale.ops.precision import Policy
from jaxscale.train.metrics import read_history
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"
ARXIV = r"\b\d{4}\.\d{4,5}\b"
STUBBED = ("pretrain", "generate", "tokenizer")  # verbs that a snippet may call


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder with what the README's commands read: the experiments, its own gin file, and what a run leaves."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "mine.gin").write_text(blocks("gin")[0])
    (tmp_path / "runs" / "main_job").mkdir(parents=True)
    left = config.load(pretrain, [ROOT / "experiments/configs/runs/main_job.gin"]).text
    (tmp_path / "runs" / "main_job" / "config.gin").write_text(left)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def shell_lines() -> list[str]:
    return [
        line.split("#")[0].strip()
        for block in blocks("sh")
        for line in block.splitlines()
        if line.strip()
    ]


def paper_rows() -> list[tuple[list[str], str]]:
    """arXiv numbers and place of each row of the tables of papers."""
    rows = [line.strip("|").split("|") for line in README.splitlines() if line.startswith("|")]
    return [
        (re.findall(ARXIV, row[1]), row[2].strip()) for row in rows if re.findall(ARXIV, row[1])
    ]


def test_the_paths_exist():
    quoted = re.findall(r"`([\w.-]+/[\w./-]+)`", README)
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    named = re.findall(r"experiments/[\w./-]+\.(?:gin|py)", README)
    paths = {path for path in [*quoted, *linked, *named] if not path.startswith("runs/")}
    assert paths and not [path for path in sorted(paths) if not (ROOT / path).exists()]


def test_the_tree_is_what_exists():
    tree = next(block for block in blocks("") if block.startswith("Makefile"))
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name if name.endswith("/") else ROOT
            names = [
                ROOT / each for each in (line.split() if line.startswith("Makefile") else [name])
            ]
        else:
            names = [folder / name]
        assert not [path for path in names if not path.exists()], line


def test_the_tree_names_every_package():
    packages = {path.parent.name for path in (ROOT / "jaxscale").glob("*/__init__.py")}
    assert not [
        name for name in packages if f" {name}/" not in README and f"\n{name}/" not in README
    ]


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", "\n".join(shell_lines()))) | set(
        re.findall(r"`make ([a-z]+)`", README)
    )
    assert {"train", "test"} <= named <= targets


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("jaxscale ")])
def test_the_commands_load(line, repository):
    """Everything up to the verb's call."""
    options = cli._parser().parse_args(shlex.split(line)[1:])
    verb = cli.VERBS[options.verb]
    assert config.load(
        cli._load(verb.bound_as or verb.function), [options.file], options.set
    ).arguments


def test_a_run_on_ones_own_text(repository, capsys):
    """A hundred modules of the standard library as texts, two steps."""
    (repository / "texts").mkdir()
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:100]):
        (repository / "texts" / f"{number}.{('txt', 'md')[number % 2]}").write_bytes(
            path.read_bytes()
        )
    assert cli.main(["tokenizer", "mine.gin"]) == 0
    assert "tokenizer of 2048 tokens: runs/mine/tokenizer" in capsys.readouterr().out
    overrides = ["train.steps=2", "train.evaluate_every=2", "optimizer.warmup_steps=1"]
    assert cli.main(["pretrain", "mine.gin", *(f"--set={override}" for override in overrides)]) == 0
    assert [
        line
        for line in read_history(Path("runs/mine/metrics.jsonl"))
        if "held_out/bits_per_byte" in line
    ]
    assert {path.name for path in Path("runs").iterdir()} == {"main_job", "mine"}
    assert [path.name for path in Path("runs/main_job").iterdir()] == ["config.gin"]


@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
def test_the_axes_of_the_example_fit_its_run(tmp_path):
    path = tmp_path / "axes.gin"
    lines = ["from __gin__ import dynamic_registration", "from jaxscale.data import loader"]
    lines += ["from jaxscale.parallel import mesh"]
    lines += [
        "from jaxscale.train import plan",
        f"include '{ROOT}/experiments/configs/runs/llama_1b.gin'",
    ]
    path.write_text(
        "\n".join([*lines, next(block for block in blocks("gin") if "mesh.MeshConfig" in block)])
    )
    run = config.load(pretrain, [path]).arguments
    parts = {name: run[name] for name in ("model", "mesh", "data", "optimizer", "train", "stack")}
    plan = make_plan(
        **parts, policy=Policy(), devices=described_devices("h200", num_hosts=2, gpus_per_host=8)
    )
    assert plan.region.schedule.num_chunks == 2 and plan.region.ring == 2


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_the_snippets_run_up_to_the_verbs_calls(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = []
    for name in STUBBED:
        module, function = cli.VERBS[name].function.split(":")
        original = cli._load(cli.VERBS[name].function)
        stub = functools.wraps(original)(lambda **arguments: calls.append(arguments))
        monkeypatch.setattr(f"{module}.{function}", stub)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert calls or isinstance(names["Lines"]("x"), Source)


@pytest.mark.parametrize(("numbers", "place"), paper_rows(), ids=lambda value: str(value))
def test_a_module_cites_its_papers(numbers, place):
    if place == "planned":
        return
    paths = [ROOT / path for path in re.findall(r"`([^`]+)`", place)]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    text = "".join(file.read_text() for file in files)
    assert files and not [number for number in numbers if number not in text]


def test_every_result_says_when_where_and_how():
    for page in RESULTS.glob("20*.md"):
        assert re.match(r"\d{4}-\d{2}-\d{2}_\w+\.md$", page.name), page.name
        assert not [
            word for word in ("Hardware", "Versions", "Command") if word not in page.read_text()
        ], page.name
