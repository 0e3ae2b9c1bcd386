"""The step: micro-batches, non-finite numbers, frozen parameters, ZeRO and dtypes.

What no model changes is tested with the regression network, whose steps compile quickly.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from jaxscale import tree
from jaxscale.models import decoder
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.backends import Operations
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import BATCH_SPEC, MeshConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.types import InputError, Role
from tests.train.examples import (
    EXECUTION,
    OPTIMIZER,
    Training,
    assert_close,
    assert_same_bits,
    make_batch,
    make_model,
    make_regression,
    make_training,
)
from tests.train.regression import abstract_rows, make_rows, squared_error

LONG = pytest.mark.long


def test_figures_are_means_over_valid_tokens():
    training, batch = make_training(), make_batch()
    loss_and_gradient = jax.jit(
        jax.value_and_grad(lambda params: training.setup.loss_fn(params, batch, None)[0])
    )
    total, gradient = loss_and_gradient(training.first.params)
    metrics = training.run(batch)[1]
    valid, total = batch["weights"].sum(), float(total)
    assert metrics["weight"] == valid
    assert metrics["loss"] == pytest.approx(total / valid, rel=1e-5)
    assert metrics["nll"] == pytest.approx(total / valid, rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(
        float(optax.tree.norm(gradient)) / valid, rel=1e-5
    )
    assert metrics["parameter_norm"] == pytest.approx(
        float(optax.tree.norm(training.first.params)), rel=1e-5
    )


def test_microbatches_equal_one_batch():
    """Micro-batches have unequal numbers of valid tokens; with two valid rows half have none."""
    one, four = make_regression(), make_regression(num_microbatches=4)
    for batch in (make_rows(0), make_rows(1, num_valid_rows=2)):
        wanted, wanted_metrics = one.run(batch)
        got, metrics = four.run(batch)
        assert_close(got, wanted, 1e-6)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, wanted_metrics[name], rtol=1e-5, err_msg=name)


@LONG
def test_microbatches_of_a_decoder_equal_one_batch():
    got, metrics = make_training(num_microbatches=4).run(make_batch())
    wanted, wanted_metrics = make_training().run(make_batch())
    assert_close(got, wanted, 1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted_metrics[name], rtol=1e-5, err_msg=name)


class SquaredErrorTwice:
    """A loss by which a step makes two updates."""

    num_epochs = 2

    def __call__(self, *arguments, operations):
        return squared_error(*arguments, operations=operations)


def test_epochs_of_a_step_are_updates_by_the_same_batch():
    once = make_regression(optimizer=dataclasses.replace(OPTIMIZER, final_fraction=1.0))
    twice = Training(dataclasses.replace(once.setup, loss_fn=SquaredErrorTwice()))
    got, metrics = twice.run(make_rows(0), make_rows(1))
    before, first = once.run(make_rows(0), make_rows(0), make_rows(1))
    wanted, second = once.run(make_rows(1), state=before)
    assert got.step == 2 and first["loss"] > second["loss"]
    assert_close(dataclasses.replace(got, step=wanted.step), wanted, 1e-6)
    assert metrics.pop("is_finite")
    for name, value in metrics.items():
        mean = (first[name] + second[name]) / 2
        np.testing.assert_allclose(value, mean, rtol=1e-5, err_msg=name)


def test_a_batch_without_a_valid_token_is_no_fault():
    training = make_training()
    state, metrics = training.run(make_batch(num_valid_rows=0))
    assert metrics["is_finite"]
    assert metrics["loss"] == metrics["gradient_norm"] == metrics["weight"] == 0
    scale = tree.flatten(state.params)["final_norm/scale"]
    np.testing.assert_array_equal(scale, 1)  # neither gradient nor decay


def test_a_bad_batch_leaves_the_state_and_stops_all_later_steps():
    training, good = make_training(), make_batch()
    weights = np.where(np.arange(16) == 3, np.float32(np.nan), good["weights"])
    before, _ = training.run(good)
    wanted = jax.tree.map(jnp.copy, before)
    after, metrics = training.run(good | {"weights": weights}, state=before)
    assert not metrics["is_finite"] and not after.is_finite and np.isnan(metrics["loss"])
    assert_same_bits(dataclasses.replace(after, is_finite=wanted.is_finite), wanted)
    later, metrics = training.run(good, state=after)
    assert not metrics["is_finite"] and np.isfinite(metrics["loss"])
    assert_same_bits(dataclasses.replace(later, is_finite=wanted.is_finite), wanted)


def test_weights_of_any_scale_give_the_same_means():
    training, batch = make_training(), make_batch()
    wanted, _ = training.run(batch)
    got, metrics = training.run(batch | {"weights": batch["weights"] * np.float32(0.001)})
    assert metrics["weight"] < 1
    assert_close(got, wanted, 1e-6)


def test_forbidden_words_stay_forbidden_and_stop_no_step():
    """As if their bias were finite and their probability still 0; one is a label of weight 0."""
    training, batch = make_training(make_model(use_head_bias=True)), make_batch()
    batch["labels"] = np.where(batch["weights"] > 0, batch["labels"] % 20 + 5, 2).astype(np.int32)
    is_forbidden = np.arange(32) < 5

    def run(value):
        state = training.start()
        bias = jnp.where(is_forbidden, value, state.params["head"]["bias"])
        head = state.params["head"] | {"bias": bias}
        state = dataclasses.replace(state, params=state.params | {"head": head})
        return training.run(batch, batch, state=state)

    state, metrics = run(-jnp.inf)
    wanted, wanted_metrics = run(-1e4)
    assert metrics["is_finite"]
    for name in ("loss", "nll", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-5, err_msg=name)
    bias = state.params["head"].pop("bias")
    assert (bias[is_forbidden] == -np.inf).all()
    of_others = wanted.params["head"].pop("bias")[~is_forbidden]
    np.testing.assert_allclose(bias[~is_forbidden], of_others, rtol=1e-6)
    assert_close(state, wanted, 1e-6)
    norm = training.setup.norm(state.params | {"head": state.params["head"] | {"bias": bias}})
    others = [*jax.tree.leaves(state.params), bias[~is_forbidden]]
    np.testing.assert_allclose(norm, optax.tree.norm(others), rtol=1e-6)


def test_an_update_that_is_not_finite_stops_the_run():
    """Loss and gradient are finite. The next step finds that the update was not."""
    training = make_regression(optimizer=OptimizerConfig(learning_rate=3e38, weight_decay=10.0))
    state, metrics = training.run(make_rows(0))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    later, metrics = training.run(make_rows(1), state=jax.tree.map(jnp.copy, state))
    assert not metrics["is_finite"] and not np.isfinite(metrics["parameter_norm"])
    assert_same_bits(dataclasses.replace(later, is_finite=state.is_finite), state)


def test_a_bad_parameter_leaves_the_state():
    training = make_training()
    bad = training.start()
    bad.params["final_norm"]["scale"] = bad.params["final_norm"]["scale"].at[3].set(jnp.inf)
    after, metrics = training.run(make_batch(), state=jax.tree.map(jnp.copy, bad))
    assert not metrics["is_finite"]
    assert_same_bits(dataclasses.replace(after, is_finite=bad.is_finite), bad)


def test_frozen_parameters_stay_and_have_no_optimizer_state():
    training = make_regression(trainable=".*/weights")
    state, _ = training.run(make_rows(0))
    trained = {"wide/weights", "narrow/weights"}
    before, after = tree.flatten(training.first.params), tree.flatten(state.params)
    assert {path for path in after if not np.array_equal(before[path], after[path])} == trained
    moments = [path for path, leaf in tree.flatten(state.opt_state).items() if leaf.ndim]
    assert len(moments) == 4 and all(path.endswith(tuple(trained)) for path in moments)


def test_a_pattern_that_trains_nothing_is_refused():
    message = r"TrainConfig.trainable: given 'attention', .* matches one of .*attention/q"
    with pytest.raises(InputError, match=message):
        make_training(trainable="attention")


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_zero_levels_give_the_same_update(zero):
    batches = make_rows(0), make_rows(1)
    wanted, wanted_metrics = make_regression(MeshConfig(data=2, zero=1)).run(*batches)
    got, metrics = make_regression(MeshConfig(data=2, zero=zero)).run(*batches)
    assert_close(got, wanted, 1e-6)
    norm = float(wanted_metrics["gradient_norm"])
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    single, _ = make_regression().run(*batches)
    assert_close(got, single, 1e-6)


@LONG
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_zero_levels_give_a_decoder_the_same_update(zero):
    batches = make_batch(), make_batch(1)
    got, metrics = make_training(mesh=MeshConfig(data=2, zero=zero)).run(*batches)
    wanted, wanted_metrics = make_training().run(*batches)
    assert_close(got, wanted, 1e-6)
    norm = float(wanted_metrics["gradient_norm"])
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("zero", range(4))
def test_a_step_leaves_its_share_of_the_state_on_a_device(zero):
    """From ZeRO 1 on half of the optimizer state, with ZeRO 3 also half of the parameters."""
    training = make_regression(MeshConfig(data=2, zero=zero))
    state, _ = training.run(make_rows(0), make_rows(1))
    abstract = tree.flatten(training.setup.state)
    for path, leaf in tree.flatten(state).items():
        assert leaf.sharding.is_equivalent_to(abstract[path].sharding, leaf.ndim), path
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert bytes_of(state.params) == (whole // 2 if zero == 3 else whole)
    moments = 2 * whole if zero == 0 else whole
    assert bytes_of(state.opt_state) == pytest.approx(moments, abs=16)  # and counters


def test_each_device_updates_its_share():
    """Under ZeRO-1, where each holds all gradients: AdamW takes a root for each second moment."""
    training = make_regression(MeshConfig(data=2, zero=1))
    batch = abstract_rows(NamedSharding(training.setup.mesh, BATCH_SPEC))
    compiled = training.step.lower(training.setup.state, batch).compile().as_text()
    roots = re.findall(r"f32\[([\d,]+)\]\S* sqrt\(", compiled)
    whole = sum(leaf.size for leaf in jax.tree.leaves(training.first.params))
    assert sum(math.prod(map(int, shape.split(","))) for shape in roots) == whole // 2


def bytes_of(part):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(part))


def test_the_state_is_donated():
    training = make_training()
    before = training.start()
    training.run(make_batch(), state=before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))


def test_low_precision_compute_keeps_master_parameters():
    """An update far below bfloat16's resolution must not be lost."""
    optimizer = OptimizerConfig(learning_rate=1e-6, weight_decay=0.0)
    training = make_training(compute="bfloat16", optimizer=optimizer)
    state, metrics = training.run(make_batch())
    _, wanted = make_training().run(make_batch())
    types = {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.opt_state))}
    assert types <= {"float32", "int32"}
    assert metrics["loss"] == pytest.approx(float(wanted["loss"]), rel=1e-2)
    assert metrics["loss"] != wanted["loss"]
    before, after = tree.flatten(training.first.params), tree.flatten(state.params)
    for path, leaf in after.items():
        assert 0 < np.abs(leaf - before[path]).max() < 2e-6, path


def test_every_parameter_of_a_run_in_bfloat16_learns():
    """A scale next to 1 has steps of 2^-7 there, so that norms and biases are stored wider."""
    model = make_model(use_bias=True, norm="layernorm")
    optimizer = OptimizerConfig(learning_rate=3e-4, weight_decay=0.0)
    training = make_training(model, optimizer=optimizer, compute="bfloat16", parameters="bfloat16")
    state, _ = training.run(*map(make_batch, range(5)))
    before, after = tree.flatten(training.first.params), tree.flatten(state.params)
    for path, leaf in after.items():
        is_small = "norm" in path or path.endswith("bias")
        assert leaf.dtype == ("float32" if is_small else "bfloat16"), path
        assert (np.asarray(leaf) != np.asarray(before[path])).any(), path


def test_what_is_converted_to_the_compute_type_is_said_by_the_role(monkeypatch):
    """Not by the name: here `q` is a router and the norm before the feed-forward a matrix."""
    model = make_model()
    roles = dict(decoder._roles(model))
    roles["layers/0/attention/q"] = Role.ROUTER
    roles["layers/0/ffn/norm/scale"] = Role.MATRIX
    monkeypatch.setattr(decoder, "_roles", lambda config: roles)
    params = abstract_params(parameter_table(model), "float32")
    bound = decoder.Decoder(model, Operations(), Policy(compute="bfloat16"), EXECUTION)
    converted = jax.eval_shape(functools.partial(bound.to_compute, "layers"), params["layers"])
    kept = {path for path, leaf in tree.flatten(converted).items() if leaf.dtype == "float32"}
    assert kept == {"0/attention/q", "0/attention/norm/scale"}
