"""What README and guides say holds: paths, commands, snippets, which module has which paper."""

import functools
import re
import shlex
import sysconfig
from pathlib import Path
from unittest.mock import MagicMock

import jax
import pytest

from jaxscale import cli, config
from jaxscale.data.sources import Source
from jaxscale.launch.ahead_of_time import described_devices, has_plugin
from jaxscale.parallel.sequence.layout import Zigzag
from jaxscale.run.pretrain import pretrain
from jaxscale.train.metrics import read_history

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
MAX_README_LINES = 220
RESULTS = ROOT / "experiments" / "results"
ARXIV = r"\b\d{4}\.\d{4,5}\b"
GENERATED = {"fields.md"}  # by docs/site.py
STUBBED = ("pretrain", "generate", "tokenizer")  # verbs that a snippet may call


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def gin_snippet(word: str) -> str:
    """The snippet of gin in which a word stands."""
    return next(block for block in blocks("gin") if word in block)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder with what the README's commands read.

    The experiments, its own gin file, and what a run leaves.
    """
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "mine.gin").write_text(gin_snippet("TextSource"))
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
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def paper_rows() -> list[tuple[list[str], str]]:
    """arXiv numbers and place of each row of the tables of papers."""
    rows = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("|")]
    return [
        (re.findall(ARXIV, row[1]), row[2].strip()) for row in rows if re.findall(ARXIV, row[1])
    ]


def test_the_readme_is_short():
    assert len(README.splitlines()) < MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_paths_exist(page):
    text = page.read_text()
    quoted = re.findall(r"`([\w.-]+/[\w./-]+)`", text)
    named = re.findall(r"experiments/[\w./-]+\.(?:gin|py)", text)
    written = ("runs/", "build/")  # by commands of the page
    paths = [ROOT / path for path in {*quoted, *named} if not path.startswith(written)]
    paths += [page.parent / path for path in re.findall(r"\]\(([^)#:]+)\)", text)]
    assert not [path for path in paths if not path.exists() and path.name not in GENERATED]


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
        re.findall(r"`make ([a-z]+)`", TEXT)
    )
    assert {"train", "test"} <= named <= targets


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("jaxscale ")])
def test_the_commands_load(line, repository):
    """Everything up to the verb's call."""
    left = (repository / "runs" / "main_job" / "config.gin").read_text()
    for name in ("phi3", "phi3_lora", "phi3_packed", "phi3_reward", "phi3_tuned"):
        (repository / "runs" / name).mkdir()
        (repository / "runs" / name / "config.gin").write_text(left)
    (repository / "tuned.gin").write_text(gin_snippet("ChatSource"))
    options = cli._parser().parse_args(shlex.split(line, comments=True)[1:])
    if options.verb == "checkpoint":
        assert callable(cli.load(f"{cli.CHECKPOINT}:{options.action}"))
        return
    function = cli.load(cli.VERBS[options.verb].function)
    files = [options.file] if cli.VERBS[options.verb].has_file else []
    files = [Path(file) / "config.gin" if Path(file).is_dir() else file for file in files]
    assert config.load(function, files, cli._overrides(options)).arguments


@pytest.mark.long
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
    lines = [
        "from __gin__ import dynamic_registration",
        "from jaxscale import run",
        f"include '{ROOT}/experiments/configs/runs/llama_1b.gin'",
        gin_snippet("MeshConfig"),
    ]
    path.write_text("\n".join(lines))
    run = config.load(pretrain, [path]).arguments["run"]
    setup = run.setup(described_devices("h200", num_hosts=2, gpus_per_host=8))
    assert setup.region.schedule.num_chunks == 2
    assert setup.region.token_layout == Zigzag(2)


@pytest.mark.parametrize("word", ["'runs/first'", "local/run.LayerConfig"])
def test_the_run_files_load(word, repository):
    (repository / "snippet.gin").write_text(gin_snippet(word))
    assert config.load(pretrain, ["snippet.gin"]).arguments["run"].setup(jax.devices()[:1])


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_the_snippets_run_up_to_the_verbs_calls(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = []
    monkeypatch.setattr("jaxscale.run.model.load", lambda directory: MagicMock())
    for name in STUBBED:
        module, function = cli.VERBS[name].function.split(":")
        original = cli.load(cli.VERBS[name].function)
        stub = functools.wraps(original)(lambda **arguments: calls.append(arguments))
        monkeypatch.setattr(f"{module}.{function}", stub)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert calls or "model" in names or isinstance(names["Lines"]("x"), Source)


def test_the_source_of_ones_own_yields_the_lines_of_a_file(tmp_path):
    names = {}
    exec(next(block for block in blocks("python") if "class Lines" in block), names)
    path = tmp_path / "a.txt"
    path.write_text("one\u2028two\nthree\x85\n\x0cfour", encoding="utf-8")
    documents = list(names["Lines"](str(path)).documents())
    assert documents == [("0", "one\u2028two"), ("1", "three\x85"), ("2", "\x0cfour")]


@pytest.mark.parametrize(("numbers", "place"), paper_rows(), ids=lambda value: str(value))
def test_a_module_cites_its_papers(numbers, place):
    if place == "planned":
        return
    paths = [ROOT / path for path in re.findall(r"`([^`]+)`", place)]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    text = "".join(file.read_text() for file in files)
    assert files and not [number for number in numbers if number not in text]


def test_every_paper_of_a_method_is_in_a_table():
    """But those of models of Hugging Face, which the files of their families name."""
    known = {number for numbers, _ in paper_rows() for number in numbers}
    cited = {}
    for file in (ROOT / "jaxscale").rglob("*.py"):
        if "families" not in file.parts:
            cited |= dict.fromkeys(re.findall(rf"arXiv ({ARXIV})", file.read_text()), file.name)
    assert cited and not {number: cited[number] for number in cited.keys() - known}


def test_every_result_says_when_where_and_how():
    pages = list(RESULTS.glob("20*.md"))
    assert pages
    for page in pages:
        assert re.match(r"\d{4}-\d{2}-\d{2}_\w+\.md$", page.name), page.name
        assert not [
            word for word in ("Hardware", "Versions", "Command") if word not in page.read_text()
        ], page.name
