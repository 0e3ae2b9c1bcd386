"""Saving and loading the state of a run: what a step waits for, seconds, peak host memory.

    python experiments/bench/checkpoint.py experiments/configs/runs/llama_1b.gin --part save \\
        --directory /tmp/bench

Parts, one process each, as memory is counted from a process at rest:
- `write`: a checkpoint for the parts below, unmeasured.
- `save`: ours with a snapshot and without, beside a bare copy to the host.
- `orbax`: its own asynchronous save and its restore.
- `load`: what was written, on this mesh; with `--from FOLDER` also what another mesh wrote.
- `reshard`: loads what was written with every leaf cut over all devices along its last dim that
  they divide, and saves it so into FOLDER given by `--from`.
`checkpoint_torch.py` is torch's distributed checkpoint beside it. Steps are a matmul of `--work`
rounds and a donated update of the whole state; there are `--steps` without a save and with one.
`--dtype bfloat16` halves the state, for a machine without memory for two of it.
"""

import argparse
import contextlib
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from checkpoint_meter import measured, stall
from gin_run import make_parser, start_run
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxscale import tree
from jaxscale.checkpoint.loading import load
from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.checkpoint.native import NativeCheckpoint

WIDTH = 4096


def drawn(abstract):
    """A state of random numbers, which no compressor makes smaller."""

    def draw():
        key = jax.random.key(0, impl="rbg")

        def one(path, leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.zeros(leaf.shape, leaf.dtype)
            number = sum(map(ord, path))
            return jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)

        return tree.map_with_path(one, abstract)

    return jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def without_key(state):
    """The state as plain arrays: keys of its own type are none of what is measured."""
    return {"params": state.params, "opt_state": state.opt_state}


def of_type(leaf: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    """A leaf of floating numbers in another type."""
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    wanted = jnp.dtype(dtype) if is_float else leaf.dtype
    return jax.ShapeDtypeStruct(leaf.shape, wanted, sharding=leaf.sharding)


def make_step(work: int):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, matrix):
        matrix = jax.lax.fori_loop(0, work, lambda _, x: jnp.tanh(x @ x) * 0.01, matrix)
        factor = 1 - 1e-9 * jnp.mean(matrix).astype(jnp.float32)

        def update(leaf):
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            return (leaf * factor).astype(leaf.dtype) if is_float else leaf

        return jax.tree.map(update, state), factor

    return step


class Training:
    """Steps that wait for each other, as a loop does that logs each of them."""

    def __init__(self, abstract, work: int):
        self.state = drawn(abstract)
        self._matrix = jnp.ones((WIDTH, WIDTH), jnp.bfloat16)
        self._step = make_step(work)
        self.step()

    def step(self) -> None:
        self.state, factor = self._step(self.state, self._matrix)
        factor.block_until_ready()


def run_save(abstract, options) -> None:
    training = Training(abstract, options.work)
    for use_snapshot in (True, False):
        shutil.rmtree(options.directory, ignore_errors=True)
        config = CheckpointConfig(str(options.directory), 1, 1, use_snapshot=use_snapshot)
        with contextlib.closing(Checkpoints(config, fingerprint={})) as checkpoints:
            with measured(f"prepare, snapshot={use_snapshot}"):
                checkpoints.prepare(abstract)
            for step in (1, 2):
                name = f"save {step}, snapshot={use_snapshot}"

                def save(step=step, checkpoints=checkpoints):
                    checkpoints.save(step, training.state, {})

                with measured(f"  {name}: until committed"):
                    stall(name, training.step, save, options.steps)
                    checkpoints.wait()
    host = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), abstract)
    for which in ("first", "second"):
        with measured(f"bare copy to the host, {which}"):
            jax.block_until_ready(jax.device_put(training.state, host))


def run_write(abstract, options) -> None:
    shutil.rmtree(options.directory, ignore_errors=True)
    config = CheckpointConfig(str(options.directory), 1, 1, is_async=False)
    checkpoints = Checkpoints(config, fingerprint={})
    checkpoints.save(1, drawn(abstract), {})
    checkpoints.close()


def run_orbax(abstract, options) -> None:
    training = Training(abstract, options.work)
    with contextlib.closing(ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())) as orbax:
        shutil.rmtree(options.directory, ignore_errors=True)

        def save():
            orbax.save(options.directory / "1", training.state)

        with measured("  orbax, save: until committed"):
            stall("orbax, save", training.step, save, options.steps)
            orbax.wait_until_finished()
        training.state = None
        with measured("orbax, restore"):
            jax.block_until_ready(orbax.restore(options.directory / "1", abstract))


def run_load(abstract, options) -> None:
    with measured("the device, started"):
        jnp.zeros(()).block_until_ready()
    folders = {"this mesh": options.directory}
    if options.source:
        folders["another mesh"] = options.source
    for name, folder in folders.items():
        load_each_way(f"written by {name}", folder, abstract, options.budget)


def load_each_way(name: str, folder: Path, abstract, budget: float) -> None:
    newest = max(folder.glob("[0-9]*"))
    leaves = NativeCheckpoint(newest).leaves()
    for which in ("first", "second"):  # the first compiles
        with measured(f"load, {name}, budget {budget:g} GiB, {which}"):
            jax.block_until_ready(load(leaves, abstract, budget_bytes=int(budget * 2**30)))
    checkpoints = Checkpoints(CheckpointConfig(str(folder), 1, 1), fingerprint={})
    with measured(f"checksums and restore, {name}"):
        jax.block_until_ready(checkpoints.restore(abstract)[0])
    checkpoints.close()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    arguments = ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
    )
    with measured(f"orbax, restore of the same, {name}"):
        jax.block_until_ready(handler.restore(newest / "state", args=arguments))


def run_reshard(abstract, options) -> None:
    abstract = jax.tree.map(cut_last_dim, abstract)
    leaves = NativeCheckpoint(max(options.directory.glob("[0-9]*"))).leaves()
    with measured("load onto all devices, arrays on the host"):
        state = load(leaves, abstract, budget_bytes=int(options.budget * 2**30))
        jax.block_until_ready(state)
    shutil.rmtree(options.source, ignore_errors=True)
    config = CheckpointConfig(str(options.source), 1, 1, is_async=False)
    checkpoints = Checkpoints(config, fingerprint={})
    with measured("save of all devices: until committed"):
        checkpoints.save(1, state, {})
    checkpoints.close()


def cut_last_dim(leaf):
    """The last dim that all devices divide, over them."""
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    divided = [dim for dim in range(leaf.ndim) if leaf.shape[dim] % len(devices) == 0]
    axes = ["data" if dim in divided[-1:] else None for dim in range(leaf.ndim)]
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


PARTS = {
    "write": run_write,
    "save": run_save,
    "orbax": run_orbax,
    "load": run_load,
    "reshard": run_reshard,
}


def make_options(description: str) -> argparse.ArgumentParser:
    parser = make_parser(description)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--work", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    return parser


def main() -> None:
    parser = make_options(__doc__)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--budget", type=float, default=4.0)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    abstract = without_key(run.setup(jax.devices()[:1]).canonical_state)
    abstract = jax.tree.map(lambda leaf: of_type(leaf, options.dtype), abstract)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
    kind = jax.devices()[0].device_kind
    print(f"{options.part}: {sum(sizes) / 1e9:.2f} GB in {len(sizes)} leaves, {kind}", flush=True)
    PARTS[options.part](abstract, options)


if __name__ == "__main__":
    main()
