"""A run on products of axes takes the steps that one device takes."""

import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import config, tree
from jaxscale.parallel.batch import place
from jaxscale.run.run import Run
from jaxscale.train.step import make_step
from tests.train.examples import make_batch

TINY = Path(__file__).resolve().parents[1] / "tiny.gin"
# AdamW's first steps are mere signs, which blow rounding up, unless epsilon is large.
SETTINGS = (
    "model.num_layers=2",
    "model.vocab_size=64",
    "train.num_microbatches=2",
    "execution.is_scanned=True",
    "optimizer.epsilon=1.0",
    "optimizer.learning_rate=0.1",
    "data.sequence_length=16",
    "mesh.data=1",
    "mesh.tensor=1",
)
EXPERTS = """
run.ExpertsConfig.num_experts = 4
run.ExpertsConfig.num_active = 2
run.ExpertsConfig.dim = 16
run.ExpertsConfig.router = @run.SparseMixerRouter()
run.LayerConfig.feed_forward = @run.ExpertsConfig()
"""


def the_run(*, run: Run) -> Run:
    return run


def three_steps(gin_file, mesh):
    """(losses and norms of the gradients, the parameters' changes in canonical order)."""
    overrides = [f"mesh.{name}={size}" for name, size in mesh.items()]
    run = config.run(the_run, [gin_file], [*SETTINGS, *overrides])
    setup = run.setup(jax.devices()[: math.prod(run.mesh.sizes)])
    step, specs = make_step(setup), setup.region.specs

    def canonical(state):
        params = specs.layout.restore(state.params, specs.dims)
        return {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}

    state, figures = setup.init(run.train.seed), []
    start = canonical(state)
    for number in range(3):
        state, metrics = step(state, place(setup.mesh, make_batch(number)))
        figures += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    return figures, {path: leaf - start[path] for path, leaf in canonical(state).items()}


@pytest.fixture(scope="module")
def gin_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    names = f"CORPUS = ('{root}',)\nCACHE = '{root}'\nDIRECTORY = '{root}'\n"
    dense = f"include '{TINY}'\n{names}"
    header = "from __gin__ import dynamic_registration\nfrom jaxscale import run\n"
    files = {}
    for name, text in {"dense": dense, "experts": f"{header}{dense}{EXPERTS}"}.items():
        files[name] = root / f"{name}.gin"
        files[name].write_text(text)
    return files


@pytest.fixture(scope="module")
def on_one_device(gin_files):
    return functools.cache(lambda model: three_steps(gin_files[model], {}))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        # A permute in a branch that not all stages take would be silently wrong on a CPU.
        pytest.param("dense", dict(pipeline=2, sequence=2, ring=2), marks=LONG),
        pytest.param("experts", dict(pipeline=2, expert=2, sequence=2), marks=LONG),
        pytest.param("dense", dict(pipeline=2, sequence=4, ring=2), marks=LONG),
        pytest.param("dense", dict(pipeline=2, data=2, tensor=2, zero=3), marks=LONG),
        pytest.param("dense", dict(data=2, sequence=2, tensor=2, zero=2), marks=LONG),
        pytest.param("experts", dict(pipeline=2, expert=2, tensor=2), marks=LONG),
        pytest.param("experts", dict(expert=2, sequence=2, tensor=2), marks=LONG),
    ],
    ids=str,
)
def test_products_of_axes_take_the_steps_of_one_device(model, mesh, gin_files, on_one_device):
    figures, changes = three_steps(gin_files[model], mesh)
    wanted, wanted_changes = on_one_device(model)
    np.testing.assert_allclose(figures, wanted, rtol=2e-5)
    for path, change in changes.items():
        error = np.linalg.norm(change - wanted_changes[path])
        assert error <= 1e-3 * np.linalg.norm(wanted_changes[path]), path
