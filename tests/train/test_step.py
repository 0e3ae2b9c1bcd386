"""The step: micro-batches, the guard against non-finite numbers, frozen parameters, ZeRO and dtypes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale import tree
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch, place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.inspect import bytes_per_device
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.plan import TrainConfig
from jaxscale.types import InputError

LONG = pytest.mark.long


def run(setup, *batches, state=None):
    state = setup.start() if state is None else state
    for batch in batches:
        state, metrics = setup.step(state, place(setup.plan.mesh, batch))
    return state, metrics


def flat(state):
    """Every leaf as numpy by path, the random key by its words."""
    leaves = tree.flatten(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def assert_same_bits(got, wanted):
    for path, leaf in flat(got).items():
        np.testing.assert_array_equal(leaf, flat(wanted)[path], err_msg=path)


def assert_close(got, wanted, tolerance):
    wanted = flat(wanted)
    for path, leaf in flat(got).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=tolerance, atol=tolerance, err_msg=path)


def test_figures_are_means_over_valid_tokens(make_setup, make_batch):
    setup, batch = make_setup(), make_batch()
    loss_and_gradient = jax.jit(
        jax.value_and_grad(lambda params: setup.plan.loss_fn(params, batch, None)[0])
    )
    total, gradient = loss_and_gradient(setup.first.params)
    metrics = run(setup, batch)[1]
    valid, total = batch["weights"].sum(), float(total)
    assert metrics["weight"] == valid
    assert metrics["loss"] == pytest.approx(total / valid, rel=1e-5)
    assert metrics["nll"] == pytest.approx(total / valid, rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(
        float(optax.tree.norm(gradient)) / valid, rel=1e-5
    )
    assert metrics["parameter_norm"] == pytest.approx(
        float(optax.tree.norm(setup.first.params)), rel=1e-5
    )


def test_microbatches_equal_one_batch(make_setup, make_batch):
    """Rows r % 4 have unequal numbers of valid tokens, and with two valid rows half of the micro-batches have none."""
    one, four = make_setup(), make_setup(num_microbatches=4)
    for batch in (make_batch(), make_batch(1, num_valid_rows=2)):
        (wanted, wanted_metrics), (got, metrics) = run(one, batch), run(four, batch)
        assert_close(got, wanted, 1e-6)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, wanted_metrics[name], rtol=1e-5, err_msg=name)


def test_a_batch_without_a_valid_token_is_no_fault(make_setup, make_batch):
    setup = make_setup()
    state, metrics = run(setup, make_batch(num_valid_rows=0))
    assert (
        metrics["is_finite"]
        and metrics["loss"] == metrics["gradient_norm"] == 0 == metrics["weight"]
    )
    scale = tree.flatten(state.params)["final_norm/scale"]
    np.testing.assert_array_equal(scale, 1)  # neither gradient nor decay


def test_a_bad_batch_leaves_the_state_and_stops_all_later_steps(make_setup, make_batch):
    setup, good = make_setup(), make_batch()
    bad = good | {
        "weights": np.where(np.arange(16) == 3, np.nan, good["weights"]).astype(np.float32)
    }
    before, _ = run(setup, good)
    wanted = jax.tree.map(jnp.copy, before)
    after, metrics = run(setup, bad, state=before)
    assert not metrics["is_finite"] and not after.is_finite and np.isnan(metrics["loss"])
    assert_same_bits(dataclasses.replace(after, is_finite=wanted.is_finite), wanted)
    later, metrics = run(setup, good, state=after)
    assert not metrics["is_finite"] and np.isfinite(metrics["loss"])
    assert_same_bits(dataclasses.replace(later, is_finite=wanted.is_finite), wanted)


def test_weights_of_any_scale_give_the_same_means(make_setup, make_batch):
    batch = make_batch()
    (wanted, _), (got, metrics) = (
        run(make_setup(), batch | {"weights": batch["weights"] * f}) for f in (1, 0.001)
    )
    assert metrics["weight"] < 1
    assert_close(got, wanted, 1e-6)


def test_an_update_that_is_not_finite_stops_the_run(make_setup, make_batch):
    """Loss and gradient are finite; what the optimizer makes of them is not, which the next step finds."""
    setup = make_setup(optimizer=OptimizerConfig(learning_rate=3e38, weight_decay=10.0))
    state, metrics = run(setup, make_batch())
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    later, metrics = run(setup, make_batch(1), state=jax.tree.map(jnp.copy, state))
    assert not metrics["is_finite"] and not np.isfinite(metrics["parameter_norm"])
    assert_same_bits(dataclasses.replace(later, is_finite=state.is_finite), state)


def test_a_bad_parameter_leaves_the_state(make_setup, make_batch):
    setup = make_setup()
    bad = setup.start()
    bad.params["final_norm"]["scale"] = bad.params["final_norm"]["scale"].at[3].set(jnp.inf)
    after, metrics = run(setup, make_batch(), state=jax.tree.map(jnp.copy, bad))
    assert not metrics["is_finite"]
    assert_same_bits(dataclasses.replace(after, is_finite=bad.is_finite), bad)


def test_frozen_parameters_stay_and_have_no_optimizer_state(make_setup, make_batch):
    setup = make_setup(trainable=".*attention/[qo]")
    state, _ = run(setup, make_batch())
    trained = {"layers/0/attention/q", "layers/0/attention/o"}
    before, after = tree.flatten(setup.first.params), tree.flatten(state.params)
    assert {path for path in after if not np.array_equal(before[path], after[path])} == trained
    moments = [path for path, leaf in tree.flatten(state.opt_state).items() if leaf.ndim]
    assert len(moments) == 4 and all(path.endswith(tuple(trained)) for path in moments)


def test_a_pattern_that_trains_nothing_is_refused(make_setup):
    with pytest.raises(
        InputError,
        match=r"TrainConfig.trainable: given 'attention', .* matches one of .*attention/q",
    ):
        make_setup(trainable="attention")


@pytest.mark.parametrize("zero", [pytest.param(0, marks=LONG), pytest.param(2, marks=LONG), 3])
def test_zero_levels_give_the_same_update(make_setup, make_batch, zero):
    mesh = MeshConfig(data=2, zero=zero)
    wanted, wanted_metrics = run(
        make_setup(mesh=MeshConfig(data=2, zero=1)), make_batch(), make_batch(1)
    )
    got, metrics = run(make_setup(mesh=mesh), make_batch(), make_batch(1))
    assert_close(got, wanted, 1e-6)
    assert metrics["gradient_norm"] == pytest.approx(
        float(wanted_metrics["gradient_norm"]), rel=1e-5
    )
    single, _ = run(make_setup(), make_batch(), make_batch(1))
    assert_close(got, single, 1e-6)


@pytest.mark.parametrize("zero", [pytest.param(0, marks=LONG), 1, pytest.param(2, marks=LONG), 3])
def test_bytes_on_a_device_are_those_that_inspect_tells(make_setup, make_batch, zero):
    """After a step: from ZeRO 1 on half of the optimizer state, with ZeRO 3 also half of the parameters."""
    setup = make_setup(mesh=MeshConfig(data=2, zero=zero))
    state, _ = run(setup, make_batch(), make_batch(1))
    told = bytes_per_device(
        setup.first.params,
        setup.plan.region.specs,
        OptimizerConfig(),
        TrainConfig(steps=10),
        Policy(),
        MeshConfig(data=2, zero=zero),
    )
    size = {
        name: bytes_of(part)
        for name, part in (("parameters", state.params), ("optimizer", state.opt_state))
    }
    assert size == {name: told[name] for name in size}
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert size["parameters"] == (whole // 2 if zero == 3 else whole)
    assert size["optimizer"] == pytest.approx(
        2 * whole if zero == 0 else whole, abs=16
    )  # and counters


def test_each_device_updates_its_share(make_setup):
    """Under ZeRO-1, where each holds all parameters and gradients: AdamW takes as many roots as it has moments."""
    setup = make_setup(mesh=MeshConfig(data=2, zero=1))
    batch = abstract_batch(setup.plan.mesh, 8, 16, is_packed=True)
    compiled = setup.step.lower(setup.plan.state, batch).compile().as_text()
    roots = re.findall(r"f32\[([\d,]+)\]\S* sqrt\(", compiled)
    whole = sum(leaf.size for leaf in jax.tree.leaves(setup.first.params))
    assert sum(math.prod(map(int, shape.split(","))) for shape in roots) == whole // 2


def bytes_of(part):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(part))


def test_the_state_is_donated(make_setup, make_batch):
    setup = make_setup()
    before = setup.start()
    run(setup, make_batch(), state=before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))


def test_low_precision_compute_keeps_master_parameters(make_setup, make_batch):
    """An update far below bfloat16's resolution must not be lost."""
    setup = make_setup(
        compute="bfloat16", optimizer=OptimizerConfig(learning_rate=1e-6, weight_decay=0.0)
    )
    state, metrics = run(setup, make_batch())
    _, wanted = run(make_setup(), make_batch())
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))} <= {
        np.dtype("float32"),
        np.dtype("int32"),
    }
    assert (
        metrics["loss"] == pytest.approx(float(wanted["loss"]), rel=1e-2)
        and metrics["loss"] != wanted["loss"]
    )
    before, after = tree.flatten(setup.first.params), tree.flatten(state.params)
    for path, leaf in after.items():
        assert 0 < np.abs(leaf - before[path]).max() < 2e-6, path
