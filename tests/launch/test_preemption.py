"""A signal is heard at any moment: at once where nothing is to be saved, else after the step."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from jaxscale.launch.preemption import PATIENCE_S, SAME_WISH_S, Preemption

ROOT = pathlib.Path(__file__).parents[2]
SIGNALS = [signal.SIGTERM, signal.SIGINT]
GONE_S = 5.0

PROGRAM = """
import gc, hashlib, time
from jaxscale.launch.preemption import Preemption

def loses_the_exception():
    print("ready", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

def is_in_a_callback():
    def collect(phase, info):
        time.sleep(0.2)
    gc.callbacks.append(collect)
    print("ready", flush=True)
    while True:
        gc.collect()

def computes_outside_python():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def takes_a_step():
    preemption.protect()
    print("ready", flush=True)
    while not preemption.is_requested():
        time.sleep(0.01)
    time.sleep({step_s})

with Preemption() as preemption:
    {does}()
print("stopped cleanly", preemption.received.name, flush=True)
"""


def start(does, step_s=60):
    pipe = subprocess.PIPE
    program = PROGRAM.format(does=does, step_s=step_s)
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_protected_run_sees_a_flag_and_handlers_come_back():
    for number in SIGNALS:
        before = [signal.getsignal(name) for name in SIGNALS]
        with Preemption() as preemption:
            preemption.protect()
            assert not preemption.is_requested()
            os.kill(os.getpid(), number)
            assert preemption.is_requested()
            assert preemption.received is number
        assert [signal.getsignal(name) for name in SIGNALS] == before


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_what_has_nothing_to_save_ends_at_once(number, error):
    before = signal.getsignal(number)
    with pytest.raises(error), Preemption():
        os.kill(os.getpid(), number)
        time.sleep(GONE_S)
    assert signal.getsignal(number) is before


def test_a_signal_that_another_handler_takes_over_is_that_one_s_alone(monkeypatch):
    """A server drains for longer than a process without anything to save is given."""
    heard, exits = [], []
    monkeypatch.setattr("jaxscale.launch.preemption.RETRY_S", 0.01)
    monkeypatch.setattr("jaxscale.launch.preemption.PATIENCE_S", 0.05)
    monkeypatch.setattr(os, "_exit", exits.append)
    with Preemption():
        before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and not exits


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="in the loop"), Preemption():
        raise RuntimeError("in the loop")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_block_starts_afresh():
    preemption = Preemption()
    with preemption:
        preemption.protect()
        os.kill(os.getpid(), signal.SIGTERM)
    with preemption:
        assert not preemption.is_requested()


@pytest.mark.parametrize(
    ("does", "number"),
    [
        ("loses_the_exception", signal.SIGTERM),
        ("is_in_a_callback", signal.SIGINT),
        ("computes_outside_python", signal.SIGTERM),
        pytest.param("computes_outside_python", signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_a_process_that_cannot_be_interrupted_is_ended_all_the_same(does, number):
    """A callback that swallows the exception, and a compilation that lasts minutes."""
    process = start(does)
    process.send_signal(number)
    sent_at = time.monotonic()
    process.stderr.readline()
    assert f"{number.name}: ending; nothing has changed" in process.stderr.readline()
    assert time.monotonic() - sent_at < 2
    _, errors = process.communicate(timeout=30)
    assert "Exception ignored" not in errors
    # The latter if an exception came through, outside the callback, and Python ended.
    assert process.returncode in (128 + number, -number)
    assert time.monotonic() - sent_at < GONE_S
    assert PATIENCE_S < GONE_S


def test_a_signal_that_comes_twice_at_once_is_one_wish():
    """As a launcher's and the terminal's."""
    process = start("takes_a_step", step_s=0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert output == "stopped cleanly SIGTERM\n"
    assert errors.count("SIGTERM: stopping after this step") == 1


def test_a_later_signal_ends_at_once_with_that_signal():
    process = start("takes_a_step")
    process.send_signal(signal.SIGTERM)
    process.stderr.readline()
    assert "SIGTERM: stopping after this step" in process.stderr.readline()
    time.sleep(SAME_WISH_S + 0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "stopped cleanly" not in output


def test_a_hook_that_is_set_within_the_block_stays(monkeypatch):
    """It is asked first, and what it passes on still comes to the one before the block."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    with Preemption():
        ours = sys.unraisablehook

        def passes_on(lost):
            ours(lost)

        sys.unraisablehook = passes_on
    assert sys.unraisablehook is passes_on
    for kind in (KeyboardInterrupt, RuntimeError):
        sys.unraisablehook(types.SimpleNamespace(exc_type=kind))
    assert [lost.exc_type for lost in reported] == [KeyboardInterrupt, RuntimeError]


def test_only_our_exceptions_are_dropped_in_a_callback(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    with Preemption():
        for kind in (KeyboardInterrupt, RuntimeError, SystemExit):
            sys.unraisablehook(types.SimpleNamespace(exc_type=kind))
    assert [lost.exc_type for lost in reported] == [RuntimeError]
    assert sys.unraisablehook == reported.append
