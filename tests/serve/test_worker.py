"""The engine's thread: what is asked of it is answered, also when it fails."""

import math
import threading

import pytest

from jaxscale.serve.worker import Worker
from jaxscale.types import RunError


class Idle:
    """An engine that waits for what it is asked."""

    has_work = False

    def wait_s(self):
        return math.inf


@pytest.mark.parametrize("error", [ValueError, BaseException])
def test_an_error_of_what_is_asked_is_its_caller_s_and_the_engine_goes_on(error):
    """A panic of a library in Rust is no Exception."""
    failures = []
    worker = Worker(Idle(), deliver=lambda deltas: None, fail=failures.append)

    def fail(_):
        raise error("planted")

    with pytest.raises(error, match="planted"):
        worker.call(fail).result(10)
    assert worker.call(lambda _: "answer").result(10) == "answer"
    worker.stop()
    assert not failures


class Failing:
    """An engine whose first step fails once it is told to."""

    has_work = True

    def wait_s(self):
        return math.inf

    def __init__(self):
        self.has_begun, self.is_told = threading.Event(), threading.Event()

    def step(self):
        self.has_begun.set()
        self.is_told.wait(10)
        raise ValueError("planted")


def test_what_is_asked_while_the_engine_fails_and_after_it_is_answered():
    engine, failures = Failing(), []
    worker = Worker(engine, deliver=lambda deltas: None, fail=failures.append)
    engine.has_begun.wait(10)
    meanwhile = worker.call(lambda engine: engine)
    engine.is_told.set()
    for future in (meanwhile, worker.call(lambda engine: engine)):
        with pytest.raises(RunError, match="planted"):
            future.result(10)
    worker.stop()
    assert [str(error) for error in failures] == ["planted"]
