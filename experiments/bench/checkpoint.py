"""Saving and loading a state of any size: what the step waits for, seconds, and host memory.

    python experiments/bench/checkpoint.py --parameters 100e6 --directory /tmp/bench

The state is float32 parameters and two moments, over all devices. In turn: `save` with and without
a snapshot, orbax's restore to the same mesh and to another, and `loading.load` to both.
"""

import argparse
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxscale.checkpoint.loading import load
from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.checkpoint.native import NativeCheckpoint

WIDTH, LAYERS, BUDGET_BYTES = 2048, 8, 1 << 30


def sharding(is_first: bool):
    """Rows over all devices, or columns."""
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data") if is_first else PartitionSpec(None, "data"))


def timed(name: str, function, *arguments, **settings):
    began = time.perf_counter()
    result = jax.block_until_ready(function(*arguments, **settings))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:<40} {seconds:8.3f} s   peak RSS {peak:6.2f} GiB", flush=True)
    return result


def save(state, directory: Path, use_snapshot: bool) -> Checkpoints:
    """The second save of a process, whose programs are compiled, and a step beside it."""
    shutil.rmtree(directory, ignore_errors=True)
    config = CheckpointConfig(str(directory), 1, 1, use_snapshot=use_snapshot)
    checkpoints = Checkpoints(config, fingerprint={})
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5, tree))
    jax.block_until_ready(step(state))
    checkpoints.save(1, state, {})
    checkpoints.wait()
    timed(f"stall of save, snapshot={use_snapshot}", checkpoints.save, 2, state, {})
    timed("  a step beside it", step, state)
    timed("  until committed", checkpoints.wait)
    return checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    rows = int(options.parameters / WIDTH / LAYERS) // jax.device_count() * jax.device_count()
    names = [f"{kind}_{n}" for kind in ("w", "mu", "nu") for n in range(LAYERS)]
    draw = jax.jit(lambda n: jax.random.normal(jax.random.key(n), (rows, WIDTH)))
    state = {name: jax.device_put(draw(n), sharding(True)) for n, name in enumerate(names)}
    save({"params": state}, options.directory, False).close()
    checkpoints = save({"params": state}, options.directory, True)
    del state
    leaves = NativeCheckpoint(options.directory / "2").leaves()
    for is_first in (True, False):
        struct = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32, sharding=sharding(is_first))
        wanted = {"params": dict.fromkeys(names, struct)}
        mesh = "same" if is_first else "another"
        timed(f"verify and restore, {mesh} sharding", checkpoints.restore, wanted)
        timed(f"load, {mesh} sharding", load, leaves, wanted, budget_bytes=BUDGET_BYTES)
    checkpoints.close()


if __name__ == "__main__":
    main()
