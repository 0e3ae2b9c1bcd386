import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jaxscale.launch.preemption import Preemption

ROOT = pathlib.Path(__file__).parents[2]

LOOP = """
import time
from jaxscale.launch.preemption import Preemption
with Preemption() as preemption:
    print("ready", flush=True)
    while not preemption.is_requested():
        time.sleep(0.01)
    time.sleep(60)
print("stopped cleanly", preemption.received.name, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_sets_the_flag_and_handlers_come_back(number):
    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    with Preemption() as preemption:
        assert not preemption.is_requested()
        os.kill(os.getpid(), number)
        assert preemption.is_requested()
        assert preemption.received is number
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="in the loop"), Preemption():
        raise RuntimeError("in the loop")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_block_starts_afresh():
    preemption = Preemption()
    with preemption:
        os.kill(os.getpid(), signal.SIGTERM)
    with preemption:
        assert not preemption.is_requested()


def test_second_signal_ends_at_once_with_that_signal():
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP], cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert "SIGTERM: stopping after this step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "stopped cleanly" not in output
