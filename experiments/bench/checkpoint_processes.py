"""What the steps of several processes wait for a save of theirs, one device each.

    python experiments/bench/checkpoint_processes.py experiments/configs/runs/llama_1b.gin \\
        --directory /tmp/bench --work 400

The state is that of `checkpoint.py` with every leaf cut over all devices. A step ends with a sum
over them, so that each process waits for the slowest. The process that lost most is printed.
"""

import contextlib
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
from checkpoint import WIDTH, cut_last_dim, drawn, make_options, make_step, without_key
from checkpoint_meter import measured, stall
from gin_run import start_run
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints

ADDRESS, RANK = "127.0.0.1:29571", "CHECKPOINT_RANK"


class Training:
    """Steps of all processes."""

    def __init__(self, abstract, work: int):
        self.state = drawn(abstract)
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        own = NamedSharding(mesh, PartitionSpec("data"))
        shape = (mesh.size, WIDTH, WIDTH)
        self._matrices = jnp.ones(shape, jnp.bfloat16, device=own)
        self._step = make_step(work)
        self.step()

    def step(self) -> None:
        self.state, factor = self._step(self.state, self._matrices)
        factor.block_until_ready()


def run_rank(options) -> None:
    rank = int(os.environ[RANK])
    devices = {} if jax.config.jax_platforms == "cpu" else {"local_device_ids": [rank]}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(ADDRESS, options.processes, rank, **devices)
    run = start_run(options.file, options.set)
    whole = without_key(run.setup(jax.local_devices()[:1]).canonical_state)
    abstract = jax.tree.map(cut_last_dim, whole)
    if rank == 0:
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
        kind = jax.devices()[0].device_kind
        count = options.processes
        print(f"{sum(sizes) / 1e9:.2f} GB over {count} processes, {kind}", flush=True)
    training = Training(abstract, options.work)
    config = CheckpointConfig(str(options.directory), 1, 1, use_snapshot=True)
    with contextlib.closing(Checkpoints(config, fingerprint={})) as checkpoints:
        checkpoints.latest_step()  # as a run asks that may go on from a checkpoint
        checkpoints.prepare(abstract)
        for step in (1, 2):
            multihost_utils.sync_global_devices(f"before save {step}")
            name = f"save {step} of process {rank}"

            def save(step=step):
                checkpoints.save(step, training.state, {})

            with measured(f"  {name}: until committed"):
                stall(name, training.step, save, options.steps)
                checkpoints.wait()


def main() -> None:
    parser = make_options(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if RANK in os.environ:
        run_rank(options)
        return
    shutil.rmtree(options.directory, ignore_errors=True)
    started = []
    for rank in range(options.processes):
        environment = os.environ | {RANK: str(rank)}
        started.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    codes = [process.wait() for process in started]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
