"""Arrays that processes hand to others without a disk."""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.checkpoint.handing import HandedArrays, Handing
from jaxscale.checkpoint.loading import load
from jaxscale.types import InputError, RunError
from tests.checkpoint.states import abstract, assert_same, make_state, mesh_of

TRAINER = """
import sys
from jaxscale import tree
from jaxscale.checkpoint.handing import Handing
from tests.checkpoint.states import make_state, mesh_of
print(Handing(tree.flatten(make_state(mesh_of(4, 2), seed=3))).address[1], flush=True)
sys.stdin.read()
"""


def held_by(array, devices):
    """An array as a process sees it that has some of its devices."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    own = [shard for shard in array.addressable_shards if shard.device in devices]
    return SimpleNamespace(shape=array.shape, dtype=array.dtype, addressable_shards=own)


@pytest.fixture(scope="module")
def two_processes():
    """A state, and those that hand out the halves of its devices."""
    mesh = mesh_of(4, 2)
    state = make_state(mesh)
    halves = np.split(mesh.devices, 2)
    with contextlib.ExitStack() as opened:
        handing = []
        for half in halves:
            held = {path: held_by(leaf, half.ravel()) for path, leaf in tree.flatten(state).items()}
            handing.append(opened.enter_context(contextlib.closing(Handing(held))))
        yield state, [one.address for one in handing]


@pytest.mark.parametrize("budget_bytes", [100, 1 << 30])
def test_what_two_processes_hold_is_loaded_onto_another_mesh(two_processes, budget_bytes):
    state, addresses = two_processes
    leaves = HandedArrays(addresses).leaves()
    got = load(leaves, abstract(state, mesh_of(2, 2)), budget_bytes=budget_bytes)
    assert_same(got, state)


def test_what_a_missing_process_holds_is_named(two_processes):
    _, addresses = two_processes
    with pytest.raises(InputError, match="exactly once; nothing writes"):
        HandedArrays(addresses[:1]).leaves()
    with pytest.raises(InputError, match="exactly once; "):
        HandedArrays([*addresses, addresses[0]]).leaves()


def test_a_process_that_is_gone_is_named():
    handing = Handing({"w": jax.numpy.zeros(3)})
    leaves = HandedArrays([handing.address]).leaves()
    handing.close()
    with pytest.raises(RunError, match=r"127.0.0.1:\d+ does not answer"):
        HandedArrays([handing.address]).leaves()
    assert leaves["w"].shape == (3,)


@pytest.mark.long
@pytest.mark.processes
def test_a_training_process_hands_its_state_to_this_one():
    command = [sys.executable, "-c", TRAINER]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as trainer:
        address = ("127.0.0.1", int(trainer.stdout.readline()))
        wanted = make_state(mesh_of(1, 1), seed=3)
        leaves = HandedArrays([address]).leaves()
        got = load(leaves, abstract(wanted, mesh_of(2, 4)), budget_bytes=1 << 20)
        trainer.stdin.close()
    assert_same(got, wanted)
