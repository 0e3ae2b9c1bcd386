"""The command: what reaches the verb's function, and what a shell script can use comes out."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxscale
from jaxscale import cli, verbs
from jaxscale.launch.plugins import XLA_BRIDGE

ROOT = Path(__file__).resolve().parents[1]
VERB = """
import dataclasses, errno, logging, os, types
from jaxscale.types import RunError

@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1

@dataclasses.dataclass(frozen=True)
class Run:
    train: TrainConfig
    directory: str = ""

def describe(*, run: Run, topology: str, prompts: str = "") -> None:
    print(run, topology, prompts)

def verb(*, run: Run, fault: str = "") -> None:
    directory, train = run.directory, run.train
    if fault == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)
    if fault == "bug":
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    if fault == "unwritable":
        open(directory, "w")
    if fault == "interrupted":
        raise KeyboardInterrupt
    if fault == "stopped":
        return types.SimpleNamespace(exit_status=143)
    if fault == "not finite":
        raise RunError("step 3: first non-finite: layers/0/q")
    for _ in range(2):
        logging.getLogger("jaxscale.stub").info("a backend is chosen")
    print("steps", train.steps)
"""


@pytest.fixture
def gin_file(tmp_path, monkeypatch):
    """Stub verbs called `pretrain` and `compile`, and a gin file for them."""
    (tmp_path / "stub_verb.py").write_text(VERB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stub_verb", raising=False)
    monkeypatch.setitem(cli.VERBS, "pretrain", verbs.Verb("stub_verb:verb", "train"))
    option = ("topology", "MACHINE:HOSTSxGPUS_PER_HOST")
    describe = verbs.Verb("stub_verb:describe", "compile", option=option)
    monkeypatch.setitem(cli.VERBS, "compile", describe)
    file = tmp_path / "a.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\n"
        "import stub_verb\n"
        "stub_verb.TrainConfig.steps = 2\n"
        "stub_verb.describe.prompts = 'of another verb'\n"
    )
    return str(file)


def test_overrides_reach_the_function(gin_file, capsys):
    assert cli.main(["pretrain", gin_file, "--set", "train.steps=7", "--set", "directory=x"]) == 0
    assert capsys.readouterr().out == "steps 7\n"
    assert cli.main(["pretrain", gin_file]) == 0
    assert capsys.readouterr().out == "steps 2\n"


def test_an_option_of_its_own_is_a_parameter_of_the_verb(gin_file, capsys):
    arguments = ["compile", gin_file, "--topology", "h200:1x8", "--set", "train.steps=3"]
    assert cli.main(arguments) == 0
    run = "Run(train=TrainConfig(steps=3), directory='')"
    assert capsys.readouterr().out == f"{run} h200:1x8 of another verb\n"


def test_a_verb_takes_a_run_s_directory(gin_file, tmp_path, capsys):
    """Its saved configuration, which may be somebody else's, and its place of today."""
    (tmp_path / "moved").mkdir()
    Path(gin_file).rename(tmp_path / "moved" / "config.gin")
    arguments = ["compile", str(tmp_path / "moved"), "--topology", "h200:1x8"]
    assert cli.main(arguments) == 2
    assert "`--admit stub_verb` admits it" in capsys.readouterr().err
    assert cli.main([*arguments, "--admit", "stub_verb"]) == 0
    assert f"directory='{tmp_path / 'moved'}'" in capsys.readouterr().out


def test_whoever_closes_our_output_sees_no_traceback(tmp_path):
    """As `head` does."""
    file = ROOT / "experiments" / "configs" / "runs" / "main_job.gin"
    command = f"{sys.executable} -m jaxscale inspect {file} | head -1"
    shell = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in shell.stderr and "Exception ignored" not in shell.stderr
    assert shell.stdout == "from __gin__ import dynamic_registration\n"


def test_the_help_of_a_verb_has_its_parameters(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = capsys.readouterr().out
    assert "  max_new_tokens: int, default 100\n      longest continuation, in tokens" in text
    assert "  prompts: tuple[str, ...] | str, required" in text


def test_a_part_of_a_run_is_described(capsys):
    assert cli.main(["describe", "OptimizerConfig"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("An optimizer with its schedule.")
    assert "  clip_norm: float | None, default 1.0\n      largest global gradient norm" in text
    assert cli.main(["describe", "OptimiserConfig"]) == 2
    assert "closest is 'OptimizerConfig'" in capsys.readouterr().err


def test_a_failed_run_says_why_on_one_line(gin_file, capsys):
    assert cli.main(["pretrain", gin_file, "--set", "fault=not finite"]) == 1
    assert capsys.readouterr().err == "jaxscale pretrain: step 3: first non-finite: layers/0/q\n"


def test_what_the_library_logs_is_shown_once(gin_file, capsys):
    for _ in range(2):
        cli.main(["pretrain", gin_file])
        assert capsys.readouterr().err == "a backend is chosen\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=7", "closest is 'steps'"),
        ("train.steps=many", "given 'many', expected a value of type int"),
        ("directory=3", "given 3, expected a value of type str"),
    ],
)
def test_bad_input_exits_2_with_one_line(gin_file, capsys, override, message):
    assert cli.main(["pretrain", gin_file, "--set", override]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jaxscale pretrain: --set ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_a_missing_file_exits_2(gin_file, capsys):
    assert cli.main(["pretrain", gin_file + "x"]) == 2
    assert "a.ginx', expected an existing gin file; closest is 'a.gin'" in capsys.readouterr().err
    assert cli.main(["pretrain", "runs/none"]) == 2
    assert "expected an existing gin file or run's directory" in capsys.readouterr().err


def test_a_full_disk_and_an_unwritable_directory_are_one_line(gin_file, capsys, tmp_path):
    command = ["pretrain", gin_file, "--set", f"directory={tmp_path}", "--set"]
    assert cli.main([*command, "fault=full disk"]) == 2
    assert capsys.readouterr().err == f"jaxscale pretrain: {tmp_path}: No space left on device\n"
    assert cli.main([*command, "fault=unwritable"]) == 2
    assert f"{tmp_path}: Is a directory" in capsys.readouterr().err


def test_an_interrupted_verb_says_so_and_exits_130(gin_file, capsys):
    assert cli.main(["pretrain", gin_file, "--set", "fault=interrupted"]) == 130
    assert capsys.readouterr().err == "jaxscale pretrain: interrupted\n"


def test_the_exit_status_is_that_of_the_outcome(gin_file):
    assert cli.main(["pretrain", gin_file, "--set", "fault=stopped"]) == 143


def test_a_fault_of_ours_keeps_its_traceback(gin_file):
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["pretrain", gin_file, "--set", "fault=bug"])


def test_debug_shows_the_traceback(gin_file):
    with pytest.raises(ValueError, match="closest is 'steps'"):
        cli.main(["pretrain", gin_file, "--debug", "--set", "train.step=7"])


@pytest.mark.parametrize(
    "arguments", [[], ["pretrian"], ["pretrain"], ["pretrain", "a.gin", "--sett", "x=1"]]
)
def test_a_wrong_command_line_exits_2_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: jaxscale" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_has_examples(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "jaxscale pretrain experiments/configs/" in shown and "--set train.steps=100" in shown


def test_the_files_that_help_names_exist():
    named = re.findall(r"experiments/configs/\S+\.gin", verbs.EXAMPLES)
    assert named and all((ROOT / name).is_file() for name in named), named


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxscale {jaxscale.__version__}\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_function(verb):
    assert callable(cli.load(cli.VERBS[verb].function))


def test_no_backend_starts_before_the_verb_runs():
    """The verb applies its runtime settings before JAX looks for devices.

    One of them is the number of devices.
    """
    program = (
        "import jaxscale.cli\n"
        "from jax._src import xla_bridge\n"
        "for verb in jaxscale.cli.VERBS.values():\n"
        "    jaxscale.cli.load(verb.function)\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


def test_a_plugin_that_cannot_start_is_told_in_one_line(monkeypatch, caplog):
    logger = logging.getLogger(XLA_BRIDGE)
    monkeypatch.setattr(logger, "filters", [])
    assert cli.main(["describe", "OptimizerConfig"]) == 0
    error = RuntimeError("Unable to load cuDNN.\nMore of it.")
    logger.error("Jax plugin configuration error: of cuda", exc_info=error)
    (record,) = caplog.records
    assert caplog.messages == ["Jax plugin configuration error: of cuda Unable to load cuDNN."]
    assert record.exc_info is None
