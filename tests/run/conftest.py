"""A tiny run, trained whole and stopped once for all tests of the room."""

import signal

import pytest

from jaxscale.train.loop import Outcome
from tests.run import runs


@pytest.fixture(scope="session")
def gin_file(tmp_path_factory):
    return runs.write_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def whole(gin_file, tmp_path_factory):
    """The directory of a run that nothing interrupted; tests leave it as it is."""
    directory = tmp_path_factory.mktemp("whole")
    assert runs.train(gin_file, directory) == Outcome(runs.STEPS, None)
    return directory


@pytest.fixture(scope="session")
def stopped(whole, tmp_path_factory):
    """The directory of a run of the whole run's config.gin that SIGTERM stopped after step STOP."""
    directory = tmp_path_factory.mktemp("stopped")
    with runs.stop_at(runs.STOP):
        outcome = runs.train(whole / "config.gin", directory)
    assert outcome == Outcome(runs.STOP, signal.SIGTERM)
    return directory
