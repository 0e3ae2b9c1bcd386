"""The loss-continuity matrix: a run saved on each source mesh goes on, on each target mesh.

    JAX_NUM_CPU_DEVICES=8 JAX_ENABLE_X64=1 python experiments/checkpoints/continuity.py \\
        --model dense --type float64 --directory /tmp/continuity

Losses are compared with those of one device that nothing interrupted, which has saved and loaded
nothing; and what a target holds after loading with what NumPy puts in the layers' order from the
bytes on disk. Writes `MODEL_TYPE.json`; `draw.py` makes the figure of all of them.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import Setup, make_setup
from jaxscale.train.step import make_step

BEFORE, AFTER = 4, 20  # steps until the save, and after it
BATCH, LENGTH, VOCAB = 16, 16, 64
TOLERANCES = {"float64": (1e-10, 1e-8), "float32": (1e-5, 1e-3)}
SIZES = dict(num_layers=4, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=32)
EXPERTS = dict(num_experts=4, num_active_experts=2, expert_dim=16, moe_pattern=(True,))
MESHES = {
    "one": {},
    "data8_zero0": dict(data=8, zero=0),
    "data4_zero1": dict(data=4, zero=1),
    "data4_zero2": dict(data=4, zero=2),
    "data8_zero3": dict(data=8, zero=3),
    "tensor2": dict(tensor=2),
    "data2_tensor2_zero3": dict(data=2, tensor=2, zero=3),
    "pipeline2": dict(pipeline=2),
    "pipeline4_data2_zero1": dict(pipeline=4, data=2, zero=1),
    "pipeline2_tensor2_data2_zero2": dict(pipeline=2, tensor=2, data=2, zero=2),
    "pipeline2_interleaved": dict(pipeline=2, schedule="interleaved", num_chunks=2),
    "sequence2_data2_zero3": dict(sequence=2, data=2, zero=3),
    "sequence2_tensor2": dict(sequence=2, tensor=2),
}
EXPERT_MESHES = {
    "expert4": dict(expert=4),
    "expert2_data2_zero1": dict(expert=2, data=2, zero=1),
    "expert2_tensor2_data2_zero3": dict(expert=2, tensor=2, data=2, zero=3),
    "pipeline2_expert2": dict(pipeline=2, expert=2),
}
SOURCES = {
    "dense": (
        "one",
        "data8_zero0",
        "data4_zero1",
        "data8_zero3",
        "tensor2",
        "pipeline2",
        "pipeline2_tensor2_data2_zero2",
        "sequence2_data2_zero3",
    ),
    "moe": (
        "one",
        "data4_zero1",
        "data2_tensor2_zero3",
        "pipeline2",
        "sequence2_tensor2",
        "expert4",
        "expert2_data2_zero1",
        "expert2_tensor2_data2_zero3",
    ),
}
TARGETS = {
    "dense": tuple(name for name in MESHES if name != "data4_zero2"),
    "moe": (
        *("one", "data4_zero2", "data8_zero3", "tensor2", "data2_tensor2_zero3", "pipeline2"),
        *("pipeline4_data2_zero1", "sequence2_data2_zero3", *EXPERT_MESHES),
    ),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """One model in one type, and where its checkpoints are."""

    model: str
    dtype: str
    directory: Path

    @functools.cache  # noqa: B019
    def setup(self, mesh: str) -> Setup:
        experts = EXPERTS if self.model == "moe" else {}
        config = from_flat(vocab_size=VOCAB, max_length=LENGTH, **SIZES, **experts)
        policy = Policy(*[self.dtype] * 4)
        execution = ExecutionConfig(num_loss_chunks=1, remat="none")
        fields = (MESHES | EXPERT_MESHES)[mesh]
        config_of_mesh = MeshConfig(**fields)
        return make_setup(
            table=parameter_table(config),
            loss_fn=NextTokenLoss(config, policy, execution),
            mesh=config_of_mesh,
            optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=8, epsilon=1e-3),
            train=TrainConfig(steps=BEFORE + AFTER, num_microbatches=2),
            policy=policy,
            devices=jax.devices()[: math.prod(config_of_mesh.sizes)],
        )

    @functools.cache  # noqa: B019
    def step(self, mesh: str):
        return make_step(self.setup(mesh))

    def losses(self, mesh: str, state, first: int, last: int):
        """(state, losses) of the steps from `first` up to `last`."""
        losses = []
        for number in range(first, last):
            state, metrics = self.step(mesh)(state, place(self.setup(mesh).mesh, batch(number)))
            losses.append(float(metrics["loss"]))
        return state, losses

    def save(self, mesh: str) -> list[float]:
        """Trains up to the save; returns the losses."""
        setup = self.setup(mesh)
        state, losses = self.losses(mesh, setup.init(0), 0, BEFORE)
        with self.checkpoints(mesh) as checkpoints:
            checkpoints.save(BEFORE, setup.to_canonical(state), {"position": BEFORE})
        return losses

    def resume(self, source: str, target: str) -> list[float]:
        """The losses after the save on a source, on a target."""
        setup = self.setup(target)
        with self.checkpoints(source) as checkpoints:
            saved, _ = checkpoints.restore(setup.canonical_state)
        state = setup.from_canonical(saved)
        self.check_bytes(source, target, state)
        return self.losses(target, state, BEFORE, BEFORE + AFTER)[1]

    def check_bytes(self, source: str, target: str, state) -> None:
        """That a target's arrays are those on disk, which NumPy puts in its order of layers."""
        setup = self.setup(target)
        order = setup.region.specs.layout.order
        on_disk = NativeCheckpoint(self.directory / source / str(BEFORE)).leaves()
        dims = tree.flatten(setup.dims)
        for path, leaf in tree.flatten(state).items():
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            wanted = on_disk[path][:] if leaf.ndim else on_disk[path][()]
            if dims[path].startswith("L"):
                stored = np.zeros((len(order), *wanted.shape[1:]), wanted.dtype)
                stored[order >= 0] = wanted[order[order >= 0]]
                wanted = stored
            np.testing.assert_array_equal(np.asarray(leaf), wanted, err_msg=path)

    def checkpoints(self, source: str):
        config = CheckpointConfig(str(self.directory / source), save_every=1, keep_last=1)
        return contextlib.closing(Checkpoints(config, fingerprint={"model": self.model}))


def batch(number: int) -> dict[str, np.ndarray]:
    """Rows of one global batch; the last tokens of each row are padding."""
    draw = np.random.default_rng(number)
    text = draw.integers(0, VOCAB, (BATCH, LENGTH + 1), dtype=np.int32)
    text[:, 1::2] = (text[:, :-1:2] * 3 + 1) % VOCAB  # something to learn
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[:, LENGTH - 2 :] = 0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "positions": positions,
        "segments": np.ones((BATCH, LENGTH), np.int32),
        "weights": weights,
    }


def errors(losses: list[float], wanted: list[float]) -> tuple[float, float]:
    """Relative errors of the first and of the last loss."""
    relative = np.abs(np.array(losses) / np.array(wanted) - 1)
    return float(relative[0]), float(relative[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(SOURCES), required=True)
    parser.add_argument("--type", choices=tuple(TOLERANCES), required=True)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    name = f"{options.model}_{options.type}"
    study = Study(options.model, options.type, options.directory / name)
    setup = study.setup("one")
    _, whole = study.losses("one", setup.init(0), 0, BEFORE + AFTER)
    curves, worst = {}, (0.0, 0.0)
    for source in SOURCES[options.model]:
        study.save(source)
    for target in TARGETS[options.model]:
        for source in SOURCES[options.model]:
            losses = study.resume(source, target)
            first, last = errors(losses, whole[BEFORE:])
            worst = max(worst[0], first), max(worst[1], last)
            print(f"{source} -> {target}: {first:.1e} {last:.1e}", flush=True)
            curves[f"{source} -> {target}"] = losses
    result = {"whole": whole, "curves": curves, "worst": worst}
    (options.directory / f"{name}.json").write_text(json.dumps(result))
    limits = TOLERANCES[options.type]
    is_within = worst[0] <= limits[0] and worst[1] <= limits[1]
    print(f"{name}: {len(curves)} cells, worst {worst}, limits {limits}: {is_within}")
    raise SystemExit(not is_within)


if __name__ == "__main__":
    main()
