"""SIGKILL at random moments while checkpoints are being written."""

import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).with_name("save_forever.py")
ROOT = SCRIPT.parents[2]
saver = runpy.run_path(str(SCRIPT))


def kill_while_saving(directory, *, above, delay_s):
    """Runs the script until it has committed a step above `above` and `delay_s` more, then kills it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(directory)], env=environment, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 120
        while newest_name(directory) <= above:
            assert process.poll() is None, "the script ended by itself"
            assert time.monotonic() < deadline, "no checkpoint within 120 s"
            time.sleep(0.01)
        time.sleep(delay_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def newest_name(directory):
    return max((int(path.name) for path in directory.glob("*") if path.name.isdecimal()), default=0)


def check_newest(directory):
    """The newest committed step is sound and holds what that step must hold; returns its number."""
    checkpoints = saver["open_checkpoints"](directory)
    step = checkpoints.latest_step()
    state, data_state = checkpoints.restore(saver["abstract_state"]())
    checkpoints.close()
    expected = jax.jit(saver["state_of"])(step)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
        if jax.dtypes.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)
    assert data_state == {"position": step}
    return step


def run_kills(directory, num_kills):
    newest, draw = 0, random.Random(num_kills)
    for _ in range(num_kills):
        kill_while_saving(directory, above=newest, delay_s=draw.uniform(0, 0.4))
        newest = check_newest(directory)
    committed = sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    assert committed[-1] == newest
    assert all(step % 50 == 0 for step in committed[:-3]), (
        "kept more than keep_last and keep_every ask for"
    )


def test_newest_step_survives_three_kills(tmp_path):
    run_kills(tmp_path, 3)


@pytest.mark.long
def test_newest_step_survives_twenty_kills(tmp_path):
    run_kills(tmp_path, 20)
