"""The loss of rewarded answers on one device and on meshes, beside the equation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.config import LoraConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.lora import TRAINABLE, base, without_adapters
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.rlhf.policy import PolicyLoss
from jaxscale.types import InputError
from tests.parallel.comparison import (
    KEY,
    dense,
    gradient_on_mesh,
    make_params,
    relative_errors,
)
from tests.rlhf.rewarded import MESHES

MODEL = dataclasses.replace(dense(max_length=32), lora=LoraConfig(rank=2, alpha=4.0))
with jax.enable_x64(True):
    POLICY = Policy("float64", "float64", "float64", "float64")
LOSS = PolicyLoss(MODEL, POLICY, ExecutionConfig(num_loss_chunks=2), beta=0.3)
# Of each row, the tokens of its prompt and of its answer; the last has no answer.
SIZES = ((5, 3), (2, 9), (20, 12), (1, 31), (8, 8), (3, 1), (9, 4), (7, 0))
LENGTH = 32


@functools.cache
def make_batch():
    rng = np.random.default_rng(0)
    shape = len(SIZES), LENGTH
    batch = {name: rng.integers(0, 64, shape) for name in ("tokens", "labels")}
    batch["positions"] = np.tile(np.arange(LENGTH), (len(SIZES), 1))
    batch["weights"] = np.zeros(shape)
    for row, (prompt, answer) in enumerate(SIZES):
        batch["weights"][row, prompt - 1 : prompt + answer - 1] = 1
    of_rows = rng.normal(size=(len(SIZES), 1))
    return batch | {"advantages": np.broadcast_to(of_rows, shape).copy()}


def log_p(config, params):
    batch = {name: make_batch()[name] for name in ("tokens", "positions")}
    logits, _ = Decoder(config, policy=POLICY).logits(params, batch)
    every = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(every, make_batch()["labels"][..., None], -1)[..., 0]


def by_equation(params):
    """(sum of losses, (that of -log p, that of the divergence))."""
    p = log_p(MODEL, params)
    q = jax.lax.stop_gradient(log_p(without_adapters(MODEL), base(params)))
    weights, advantages = make_batch()["weights"], make_batch()["advantages"]
    divergence = jnp.exp(q) / jnp.exp(p) - (q - p) - 1
    # The gradient of log p, weighed with the advantage: the policy gradient itself.
    gain = advantages * (p - jax.lax.stop_gradient(p) + 1)
    loss = (weights * (0.3 * divergence - gain)).sum()
    return loss, ((-p * weights).sum(), (divergence * weights).sum())


@functools.cache
def wanted():
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(by_equation, has_aux=True))
        (loss, sums), gradient = run(make_params(MODEL))
        return float(loss), [float(each) for each in sums], tree.select(gradient, TRAINABLE)


def assert_as_by_equation(sums, gradient):
    loss, (entropy, kl), wanted_gradient = wanted()
    found, weight, figures = sums
    np.testing.assert_allclose(found, loss, rtol=1e-10)
    assert weight == sum(answer for _, answer in SIZES)
    np.testing.assert_allclose(figures["entropy"], entropy, rtol=1e-10)
    np.testing.assert_allclose(figures["kl"], kl, rtol=1e-10)
    errors = relative_errors(gradient, wanted_gradient)
    assert len(errors) > 4 and all(error < 1e-10 for error in errors.values()), errors


def test_loss_and_gradient_are_those_of_the_equation():
    with jax.enable_x64(True):

        def total(params):
            sums = LOSS(params, make_batch(), None)
            return sums[0], sums

        gradient, sums = jax.jit(jax.grad(total, has_aux=True))(make_params(MODEL))
        assert_as_by_equation(sums, tree.select(gradient, TRAINABLE))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_has_the_same_loss_and_gradient(sizes):
    with jax.enable_x64(True):
        settings = dict(num_microbatches=2, trainable=TRAINABLE)
        region, run = gradient_on_mesh(MODEL, MeshConfig(**sizes), LOSS, **settings)
        stored = region.specs.layout.store(make_params(MODEL), region.specs.dims)
        assert_as_by_equation(*run(stored, make_batch(), KEY))


def test_a_forbidden_word_that_has_no_weight_changes_nothing():
    """A head's bias of -inf: of that label both log-probabilities are -inf."""
    model = dataclasses.replace(MODEL, use_head_bias=True)
    batch = dict(make_batch())
    batch["labels"] = np.where(batch["weights"] == 0, 63, batch["labels"] % 63)
    loss = dataclasses.replace(LOSS, model=model)
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(lambda params: loss(params, batch, None)[0]))
        found = []
        for bias in (-np.inf, -1e4):
            params = make_params(model)
            params["head"]["bias"] = np.where(np.arange(64) == 63, bias, 0)
            found.append(run(params))
    (value, gradient), (other, other_gradient) = found
    np.testing.assert_allclose(value, other, rtol=1e-12)
    pairs = (tree.select(each, TRAINABLE) for each in (gradient, other_gradient))
    assert all(error < 1e-9 for error in relative_errors(*pairs).values())


BAD = {
    "not causal": (dict(model=dataclasses.replace(MODEL, is_causal=False)), "sees what follows it"),
    "no adapters": (dict(model=without_adapters(MODEL)), r"ModelConfig\.lora: given None"),
    "beta": (dict(beta=-0.1), r"policy_loss\.beta: given -0\.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_meaning_is_refused(name):
    fields, message = BAD[name]
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LOSS, **fields)
