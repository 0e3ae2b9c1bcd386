"""Two processes save together, from snapshots; another mesh in one process restores."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints

SCRIPT = """
import dataclasses, pathlib, sys, threading
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxscale.checkpoint import handlers
from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.types import InputError

directory, address, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, process)
mesh = jax.make_mesh((4,), ("data",))
sharding = NamedSharding(mesh, PartitionSpec("data"))
whole = np.arange(32, dtype=np.float32).reshape(8, 4)
wanted = {"params": {"w": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)}}
config = CheckpointConfig(directory, save_every=1, keep_last=2, use_snapshot=True)
checkpoints = Checkpoints(config, fingerprint={})
overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0, out_shardings=sharding)
has_stepped, ask = threading.Event(), handlers.state_to_save

def ask_later(state):
    assert has_stepped.wait(60), "a step waited for the save"
    return ask(state)

handlers.state_to_save = ask_later
for step in (1, 2, 3):
    w = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    assert checkpoints.save(step, {"params": {"w": w}}, {"position": step})
    overwrite(w).block_until_ready()
    assert jax.numpy.sum(jax.device_put(whole, sharding)) == whole.sum()  # over both processes
    has_stepped.set()
w = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
state = {"params": {"w": w}}
assert not checkpoints.save(3, state, {"position": 3})
restored, data_state = checkpoints.restore(wanted)
assert data_state == {"position": 3}
for shard in restored["params"]["w"].addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
checkpoints.close()
jax.experimental.multihost_utils.sync_global_devices("saved")
if process == 0:
    path = next(pathlib.Path(directory, "3", "state", "params.w").glob("[0-9]*"))
    path.write_bytes(path.read_bytes()[:-1])
jax.experimental.multihost_utils.sync_global_devices("damaged")
try:
    Checkpoints(config, fingerprint={}).restore(wanted)
except InputError as error:
    print(error)
else:
    sys.exit("the damage went unseen")
tolerant = dataclasses.replace(config, use_previous=True)
restored, data_state = Checkpoints(tolerant, fingerprint={}).restore(wanted)
assert data_state == {"position": 2}
"""


@pytest.mark.long
def test_two_processes_save_and_agree_on_damage(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), address, str(number)],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "/3', expected a sound checkpoint" in output
    assert sum("params/w" in output for output in outputs) == 1

    checkpoints = Checkpoints(CheckpointConfig(str(tmp_path), 1, 2), fingerprint={})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params": {"w": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=device)}}
    state, _ = checkpoints.restore(wanted, step=2)
    np.testing.assert_array_equal(state["params"]["w"], np.arange(32).reshape(8, 4))
