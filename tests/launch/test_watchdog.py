"""The watchdog ends what does not go on, with a reason, and nothing else."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxscale.launch.watchdog import EXIT_LOST_PEER, SLOW_FACTOR, Watchdog

ROOT = Path(__file__).parents[2]
STUCK = """
import threading
from jaxscale.launch.watchdog import Watchdog
with Watchdog(0.5) as watchdog:
    watchdog.watch("step 7")
    threading.Lock().acquire() and threading.Event().wait()
"""


def test_a_stuck_step_ends_the_process_and_says_where():
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == EXIT_LOST_PEER and time.monotonic() - began < 30
    assert "jaxscale: process 0 of 1: no progress for 1 s in step 7, limit 0.5 s." in result.stderr
    assert "start the run again to go on from the newest. Exit status 75" in result.stderr
    # The stack of the thread that is stuck.
    assert 'File "<string>", line 6 in <module>' in result.stderr


@pytest.fixture
def left():
    return []


def test_a_run_that_goes_on_is_left_alone(left):
    with Watchdog(0.4, left.append) as watchdog:
        for step in range(5):
            watchdog.watch(f"step {step}")
            time.sleep(0.1)
    assert left == [] and not watchdog._thread.is_alive()


def test_what_is_slow_may_take_longer(left, capfd):
    with Watchdog(0.1, left.append) as watchdog:
        watchdog.watch("compilation", is_slow=True)
        time.sleep(0.1 * SLOW_FACTOR / 2)
        assert left == []
        watchdog.watch("step 1")
        watchdog._thread.join(timeout=30)
    assert left == [EXIT_LOST_PEER]
    assert "in step 1, limit 0.1 s" in capfd.readouterr().err


def test_without_a_timeout_there_is_no_watch(left):
    with Watchdog(None, left.append) as watchdog:
        watchdog.watch("step 1")
    assert left == []


def test_an_error_of_one_process_is_nothing_to_the_watchdog(left):
    with pytest.raises(ZeroDivisionError), Watchdog(10, left.append):
        raise ZeroDivisionError
    assert left == []
