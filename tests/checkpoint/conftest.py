"""Checkpoints that are saved once for all tests."""

import shutil

import pytest

from tests.checkpoint.states import save_steps


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """A folder with the steps 1, 2 and 3, and their states by step."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, save_steps(folder, 1, 2, 3)


@pytest.fixture
def saved_steps(saved_run):
    """Copies steps of that folder into another; returns the states by step."""
    folder, states = saved_run

    def copy(directory, *steps):
        for step in steps:
            shutil.copytree(folder / str(step), directory / str(step))
        return {step: states[step] for step in steps}

    return copy
