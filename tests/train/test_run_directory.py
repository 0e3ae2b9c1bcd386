"""A run's directory is one run's.

Another is kept out of it while the first lives, however that one ends.
"""

import errno
import fcntl
import subprocess
import sys

import pytest

from jaxscale.train import run_directory
from jaxscale.train.run_directory import held
from jaxscale.types import InputError

HOLD = """
import sys, time
from pathlib import Path
from jaxscale.train.run_directory import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_kept_out_until_the_first_is_gone(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        message = r"directory: given .*run', expected .* no other process is training"
        with pytest.raises(InputError, match=message), held(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with held(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").touch()
    with held(tmp_path / "run"):
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            ".lock",
            "metrics.jsonl",
        ]


def test_a_start_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(InputError), held(tmp_path / "a" / "run"):
        raise InputError("x", 1, "2")
    assert list(tmp_path.iterdir()) == []


def test_what_a_loss_is_given_anew_is_said_and_what_a_verb_is_given_is_not(tmp_path, monkeypatch):
    text = (
        "jaxscale.run.ppo.ppo_loss.kl_penalty = {0}\n"
        "x/jaxscale.run.generate.generate.max_new_tokens = {0}\n"
    )
    (tmp_path / "config.gin").write_text(text.format(1))
    monkeypatch.setattr(run_directory, "operative_config", lambda: text.format(2))
    assert run_directory.changes(tmp_path) == ["ppo_loss.kl_penalty 1 -> 2"]


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / "run"):
        assert "cannot be locked" in caplog.text
