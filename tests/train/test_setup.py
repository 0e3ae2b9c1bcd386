"""A run's plan on products of the axes, chosen by overrides of one gin file, takes the steps that one device takes."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import config, tree
from jaxscale.parallel.batch import place
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

TINY = Path(__file__).resolve().parents[1] / "tiny.gin"
PARTS = ("model", "mesh", "data", "optimizer", "train", "policy", "stack")
# AdamW's first steps are mere signs, which blow rounding up, unless epsilon is large.
SETTINGS = (
    "model.num_layers=2",
    "model.vocab_size=64",
    "train.num_microbatches=2",
    "stack.is_scanned=True",
    "optimizer.epsilon=1.0",
    "optimizer.learning_rate=0.1",
    "data.sequence_length=16",
    "mesh.data=1",
    "mesh.tensor=1",
)
MODELS = {
    "dense": (),
    "experts": (
        "model.moe_pattern=(True,)",
        "model.num_experts=4",
        "model.num_active_experts=2",
        "model.expert_dim=16",
        "model.router='sparsemixer_v2'",
    ),
}


def three_steps(gin_file, overrides, make_batch):
    """(losses and norms of the gradients, the parameters' change), leaves in canonical order."""
    run = config.load(pretrain, [gin_file], [*SETTINGS, *overrides]).arguments
    devices = jax.devices()[: math.prod(run["mesh"].sizes)]
    plan = make_plan(**{name: run[name] for name in PARTS}, devices=devices)
    settings = dict(specs=plan.region.specs, seed=0, trainable=run["train"].trainable)
    state = init_state(run["model"], plan.optimizer, plan.state, **settings)
    step, specs, figures = (
        make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state),
        plan.region.specs,
        [],
    )

    def canonical(state):
        return {
            path: np.array(p)
            for path, p in tree.flatten(specs.layout.restore(state.params, specs.dims)).items()
        }

    start = canonical(state)
    for number in range(3):
        state, metrics = step(state, place(plan.mesh, make_batch(number)))
        figures += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    return figures, {path: p - start[path] for path, p in canonical(state).items()}


@pytest.fixture(scope="module")
def gin_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    path = root / "run.gin"
    path.write_text(
        f"include '{TINY}'\nCORPUS = ('{root}',)\nCACHE = '{root}'\nDIRECTORY = '{root}'\n"
    )
    return path


@pytest.fixture(scope="module")
def on_one_device(gin_file, make_batch):
    return {name: three_steps(gin_file, model, make_batch) for name, model in MODELS.items()}


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        # A permute in a branch that not all stages take would be silently wrong on a CPU.
        ("dense", dict(pipeline=2, sequence=2, ring=2)),
        ("experts", dict(pipeline=2, expert=2, sequence=2)),
        pytest.param("dense", dict(pipeline=2, sequence=4, ring=2), marks=LONG),
        pytest.param("dense", dict(pipeline=2, data=2, tensor=2, zero=3), marks=LONG),
        pytest.param("dense", dict(data=2, sequence=2, tensor=2, zero=2), marks=LONG),
        pytest.param("experts", dict(pipeline=2, expert=2, tensor=2), marks=LONG),
        pytest.param("experts", dict(expert=2, sequence=2, tensor=2), marks=LONG),
    ],
    ids=str,
)
def test_products_of_axes_take_the_steps_of_one_device(
    model, mesh, gin_file, on_one_device, make_batch
):
    overrides = *MODELS[model], *(f"mesh.{name}={size}" for name, size in mesh.items())
    (figures, changes), (wanted, wanted_changes) = (
        three_steps(gin_file, overrides, make_batch),
        on_one_device[model],
    )
    np.testing.assert_allclose(figures, wanted, rtol=2e-5)
    for path, change in changes.items():
        error = np.linalg.norm(change - wanted_changes[path])
        assert error <= 1e-3 * np.linalg.norm(wanted_changes[path]), path
