"""Blocks cover the components, can run in their order, and no path leaves one and comes back."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.planner.blocks import make_blocks
from jaxscale.planner.costs import flops_of
from jaxscale.planner.trace import trace
from tests.planner.functions import costs_of, mlp, random_loss, resnet


def assert_covered_in_order(costs, blocks):
    num = len(costs.components.equations)
    members = [sorted(block.members) for block in blocks]
    covered = sorted(each for block in members for each in block)
    assert covered == list(range(num)), "every component is in one block"
    block_of = {each: number for number, block in enumerate(members) for each in block}
    for value in costs.components.values:
        for consumer in value.consumers:
            # A cut in which all edges go forwards is convex as well: no path can come back.
            assert block_of[value.producer] <= block_of[consumer]


@pytest.mark.parametrize("num_blocks", [1, 3, 7])
def test_invariants_on_models(num_blocks):
    for case in (mlp(num_layers=3), resnet(num_blocks=2)):
        costs = costs_of(case)
        blocks = make_blocks(costs, 2e11, num_blocks)
        assert len(blocks) == num_blocks
        assert_covered_in_order(costs, blocks)


def test_invariants_on_random_graphs():
    for seed in range(40):
        costs = costs_of(random_loss(seed))
        for num_blocks in (2, 5):
            assert_covered_in_order(costs, make_blocks(costs, 2e11, num_blocks))


def test_blocks_of_a_deep_model_take_about_as_long():
    costs = costs_of(mlp(num_layers=48))
    seconds = [costs.seconds(block) for block in make_blocks(costs, 2e11, 12)]
    assert max(seconds) < 2.5 * np.mean(seconds)


def test_a_part_knows_what_crosses_its_border():
    costs = costs_of(mlp(num_layers=2, width=8, rows=4))
    whole = costs.merged(costs.atoms)
    assert not whole.inputs and not whole.outputs
    assert costs.cost(whole).params_bytes == 4 * (2 * (64 + 8) + 64)
    half = costs.merged(costs.atoms[:3])
    assert {costs.components.values[each].producer for each in half.outputs} <= half.members


def test_flops_of_matmul_and_convolution():
    dense = trace(lambda p, b: (b["x"] @ p).sum(), jnp.ones((3, 5)), {"x": jnp.ones((2, 3))})
    assert flops_of(dense.program.jaxpr.eqns[0]) == 2 * 2 * 3 * 5
    case = resnet(num_blocks=1, channels=4, rows=2, size=6)
    conv = next(
        equation
        for equation in trace(*case).program.jaxpr.eqns
        if equation.primitive.name == "conv_general_dilated"
    )
    assert flops_of(conv) == 2 * (2 * 6 * 6 * 4) * (3 * 3 * 3)
