"""A plan of a model that is not ours computes what the undivided function does."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxscale.planner.atomic import make_components
from jaxscale.planner.blocks import make_blocks
from jaxscale.planner.cluster import DEVICES
from jaxscale.planner.costs import ModelledCosts
from jaxscale.planner.execute import StagedGradient
from jaxscale.planner.stages import Stage, StagePlan
from jaxscale.planner.trace import trace
from jaxscale.types import InputError
from tests.planner.functions import mlp, resnet


def plan_of(case, replicas, num_microbatches):
    """Stages of about as many blocks each, with the given replicas."""
    loss, params, batch = case
    costs = ModelledCosts(make_components(trace(loss, params, batch)), DEVICES["h200"])
    blocks = make_blocks(costs, 2e11, 8)
    cuts = np.linspace(0, len(blocks), len(replicas) + 1).astype(int)
    parts = [costs.merged(blocks[i:j]) for i, j in itertools.pairwise(cuts)]
    stages = (Stage(part, r, 1.0, 1.0) for part, r in zip(parts, replicas, strict=True))
    return StagePlan(tuple(stages), num_microbatches, 1.0)


@pytest.mark.parametrize(
    ("make", "replicas", "num_microbatches"),
    [(mlp, (1, 2, 1), 4), (resnet, (2, 1, 4), 2), (mlp, (4, 2), 1)],
)
def test_loss_and_gradient_are_those_of_the_whole_function(make, replicas, num_microbatches):
    case = loss, params, batch = make()
    plan = plan_of(case, replicas, num_microbatches)
    staged = StagedGradient(loss, params, batch, plan=plan, devices=jax.devices())
    value, gradient = staged(params, batch)
    wanted, wanted_gradient = jax.value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for leaf, wanted_leaf in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True
    ):
        scale = np.abs(wanted_leaf).max()
        np.testing.assert_allclose(leaf, wanted_leaf, rtol=0, atol=1e-6 * scale)


def test_each_stage_runs_on_its_own_devices():
    case = loss, params, batch = mlp()
    plan = plan_of(case, (1, 2, 1), 4)
    staged = StagedGradient(loss, params, batch, plan=plan, devices=jax.devices())
    assert [stage.mesh.size for stage in staged.stages] == [1, 2, 1]
    used = [device for stage in staged.stages for device in stage.mesh.devices]
    assert used == jax.devices()[:4]


def test_bad_input():
    case = loss, params, batch = mlp()
    plan = plan_of(case, (1, 2, 1), 4)
    with pytest.raises(InputError, match=r"devices.*at least the 4"):
        StagedGradient(loss, params, batch, plan=plan, devices=jax.devices()[:3])
    third = dataclasses.replace(plan, num_microbatches=3)
    with pytest.raises(InputError, match=r"8 rows.*multiple of the plan's 3"):
        StagedGradient(loss, params, batch, plan=third, devices=jax.devices())
