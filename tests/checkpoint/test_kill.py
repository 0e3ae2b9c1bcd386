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

from tests.checkpoint.states import committed

SCRIPT = pathlib.Path(__file__).with_name("save_forever.py")
ROOT = SCRIPT.parents[2]
script = runpy.run_path(str(SCRIPT))


def kill_while_saving(savers, directory, *, above, delay_s):
    """Starts a saver and kills it `delay_s` after it has committed a step above `above`."""
    savers.stdin.write("start\n")
    deadline = time.monotonic() + 120
    while newest_name(directory) <= above:
        assert time.monotonic() < deadline, "no checkpoint within 120 s"
        time.sleep(0.01)
    time.sleep(delay_s)
    savers.stdin.write("kill\n")
    exit_code = int(savers.stdout.readline())
    assert exit_code == -signal.SIGKILL, "the saver ended by itself"


def newest_name(directory):
    return max(committed(directory), default=0)


def assert_newest_is_sound(directory):
    """The newest committed step is sound and holds what it must hold; returns its number."""
    checkpoints = script["open_checkpoints"](directory)
    step = checkpoints.latest_step()
    state, data_state = checkpoints.restore(script["abstract_state"]())
    checkpoints.close()
    expected = script["state_of"](step)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)
    assert data_state == {"position": step}
    return step


def assert_newest_step_survives(directory, num_kills):
    newest = 0
    draw = random.Random(num_kills)
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=1,
        text=True,
    ) as savers:
        for _ in range(num_kills):
            delay_s = draw.uniform(0, 0.4)
            kill_while_saving(savers, directory, above=newest, delay_s=delay_s)
            newest = assert_newest_is_sound(directory)
    steps = committed(directory)
    assert steps[-1] == newest
    kept_for_ever = [step for step in steps if step % 50 == 0]
    # A saver may be killed between the commit of a step and the deletion of the oldest one.
    assert set(steps[:-3]) <= set(kept_for_ever), "more are kept than keep_last and keep_every ask"


def test_newest_step_survives_three_kills(tmp_path):
    assert_newest_step_survives(tmp_path, 3)


@pytest.mark.long
def test_newest_step_survives_twenty_kills(tmp_path):
    assert_newest_step_survives(tmp_path, 20)
