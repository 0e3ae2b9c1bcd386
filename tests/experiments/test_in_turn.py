"""The commands of a list run on the GPUs that they need, end in their time and leave their results.

The GPUs are those that a script in place of nvidia-smi lists; the commands are the shell's.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments/bench/in_turn.py"
# Waits until another line has begun; this line's limit ends it if that never comes.
MEET = "touch $FILES/here; while [ ! -e $FILES/../{}/here ]; do sleep 0.02; done"


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts `in_turn.py` over some lines on two GPUs; its output folder is tmp_path/out."""
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/bash\necho GPU 0: a card\necho GPU 1: a card\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def begin(*lines, **options):
        path = tmp_path / "list.txt"
        path.write_text("\n".join(["# What they are.", *lines]))
        settings = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, SCRIPT, path, "--output", tmp_path / "out", *settings]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return begin


@pytest.fixture
def results(tmp_path):
    """Line -> what results.jsonl has of it."""

    def results():
        lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
        return {each["line"]: each for each in map(json.loads, lines)}

    return results


def printed(process):
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


def is_running(number):
    """Whether a process is there, and not only its ending, which nobody has asked for."""
    status = Path(f"/proc/{number}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_lines_for_one_gpu_run_beside_each_other_and_a_line_for_two_alone(begin, results):
    own = 'echo {\\"gpu\\": $CUDA_VISIBLE_DEVICES}'
    output = printed(
        begin(
            f"a | 1 GPU, 1 s, at most 20 s | {own}; {MEET.format('b')}",
            f"b | 1 GPU, 1 s, at most 20 s | {own}; {MEET.format('a')}",
            "both | 2 GPUs, 1 s | echo [$CUDA_VISIBLE_DEVICES]; touch $FILES/here",
            "all | ls $FILES/../both/here",
        )
    )
    found = results()
    assert [found[name]["gpu"] for name in "ab"] == [0, 1]
    assert [found[name]["ending"] for name in found] == ["done"] * 4
    assert [found[name]["beside_others"] for name in found] == [True, True, False, False]
    assert [found[name]["gpus"] for name in ("both", "all")] == [[0, 1]] * 2
    assert "\n    []\n" in output, "a line that takes all GPUs sees all"
    assert "b | 1 | " in output and " done *\n" in output


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores are divided")
def test_each_lane_has_its_share_of_the_cores(begin, tmp_path):
    show = f'{sys.executable} -c "import os; print(*os.sched_getaffinity(0))"'
    printed(
        begin(
            f"a | 1 GPU, 1 s, at most 20 s | {show}; {MEET.format('b')}",
            f"b | 1 GPU, 1 s, at most 20 s | {show}; {MEET.format('a')}",
            f"both | 2 GPUs, 1 s | {show}",
        )
    )
    cores = {
        name: (tmp_path / f"out/{name}.txt").read_text().split() for name in ("a", "b", "both")
    }
    assert len(cores["a"]) == len(cores["b"]) and not set(cores["a"]) & set(cores["b"])
    assert set(cores["both"]) >= {*cores["a"], *cores["b"]}


def test_a_line_that_is_too_long_is_killed_with_its_children_and_the_next_goes_on(
    begin, results, tmp_path
):
    # As torchrun starts its workers: in a session of their own.
    child = '(setsid sleep 600 & echo $! > $FILES/child); echo {\\"ms\\": 3}; sleep 600'
    printed(begin(f"long, child | 2 GPUs, 0 s, at most 1 s | {child}", "next | echo on"))
    found = results()
    assert found["long, child"]["ending"] == "killed" and found["long, child"]["ms"] == 3
    assert found["next"]["ending"] == "done"
    number = int((tmp_path / "out/long_child/child").read_text())
    assert not is_running(number)


def test_what_there_is_no_time_for_is_left_out_and_shorter_lines_run(begin, results):
    output = printed(
        begin(
            "long | 2 GPUs, 500 s | sleep 500", "short | 1 GPU, 1 s | echo here", **{"limit-s": 30}
        )
    )
    assert list(results()) == ["short"]
    assert "long | left out, foretold 500 s" in output


def test_results_so_far_are_kept_when_it_is_ended(begin, results, tmp_path):
    process = begin(
        'first | echo {\\"ms\\": 1}', "second | touch $FILES/begun; sleep 600", "third | echo 3"
    )
    while not (tmp_path / "out/second/begun").exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert results()["first"]["ms"] == 1, "kept before the others have ended"
    process.send_signal(signal.SIGTERM)
    output = printed(process)
    assert {name: each["ending"] for name, each in results().items()} == {
        "first": "done",
        "second": "killed",
    }
    assert "third | left out" in output


def test_a_call_goes_on_where_one_before_it_ended(begin, results, tmp_path):
    lines = "done | echo {} >> $FILES/times", "fails | echo {} >> $FILES/times; exit 1"
    for _ in range(2):
        output = printed(begin(*lines))
    times = {name: (tmp_path / f"out/{name}/times").read_text() for name in ("done", "fails")}
    assert {name: text.count("{}") for name, text in times.items()} == {"done": 1, "fails": 2}
    assert "done | 0,1 | 0 of 0 | done" in output, "the table has it all the same"


def test_the_table_is_short_whatever_the_commands_print(begin):
    loud = 'for i in $(seq 300); do echo {\\"ms\\": $i, \\"other\\": \\"a long text\\"}; done'
    output = printed(begin(*[f"a line with a name, number {i} | {loud}" for i in range(40)]))
    assert len(output) < 12_000
    assert output.count("ms 300") == 40


def test_figures_keep_their_own_name_and_are_told_in_short(begin, results):
    figures = (
        'echo {\\"name\\": \\"of a mesh\\", \\"ms\\": 2.5, \\"long\\": [1, 2]}; echo not one {'
    )
    output = printed(begin(f"a line | {figures}"))
    assert results()["a line"]["name"] == "of a mesh"
    assert "    name of a mesh, ms 2.5\n    not one {\n" in output


def test_a_line_that_cannot_be_read_is_named(begin):
    process = begin("fine | echo", "odd | 1 GPU, 90s | echo")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "expected NAME | 1 GPU, 90 s | COMMAND, given 'odd | 1 GPU, 90s | echo'" in output
