"""Sorted experts against every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops import moe
from jaxscale.ops.dispatch import make_dispatch
from jaxscale.ops.moe import experts, grouped_ffn, reference

B, T, D, F, E = 2, 6, 8, 12, 5
RNG = np.random.default_rng(0)
ROUTINGS = {
    "random": np.stack([RNG.permutation(E)[:2] for _ in range(B * T)]).reshape(B, T, 2),
    "empty_experts": np.stack([RNG.permutation([1, 3])[:2] for _ in range(B * T)]).reshape(B, T, 2),
    "all_to_one": np.full((B, T, 1), 3),
    "all_to_the_last_two": np.full((B, T, 2), (3, 4)),
    "all_experts": np.broadcast_to(np.arange(E), (B, T, E)),
}


def make(activation="swiglu", dtype="float32", num_active=2):
    rng = np.random.default_rng(1)
    names = ("up", "gate", "down") if activation != "gelu" else ("up", "down")
    weights = {
        n: jnp.asarray(rng.normal(size=(E, F, D) if n == "down" else (E, D, F)) / 3, dtype)
        for n in names
    }
    x = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    gates = jnp.asarray(rng.uniform(size=(B, T, num_active)), "float32")
    return x, gates, weights


def gradients(function, x, index, gates, weights, activation):
    """Output and gradients of a loss that weighs every output differently."""
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), "float32")

    def loss(x, gates, weights):
        y = function(x, jnp.asarray(index), gates, weights, activation)
        return (y.astype("float32") * cotangent).sum(), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, gates, weights)
    return y, gradient


@pytest.mark.parametrize(
    "routing, activation, dtype",
    [(routing, "swiglu", "float32") for routing in ROUTINGS]
    + [
        ("random", "gelu", "float32"),
        ("random", "geglu", "float32"),
        ("random", "swiglu", "bfloat16"),
    ],
)
def test_forward_and_gradient_equal_the_reference(routing, activation, dtype):
    index = ROUTINGS[routing]
    x, gates, weights = make(activation, dtype, index.shape[-1])
    got, wanted = (gradients(f, x, index, gates, weights, activation) for f in (experts, reference))
    assert got[0].dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = a.astype("float32"), b.astype("float32")
        assert jnp.abs(a - b).max() < tolerance * jnp.abs(b).max()


def test_tiles_of_one_expert_give_the_same():
    index = ROUTINGS["all_to_the_last_two"]
    tiled = functools.partial(experts, tile=4)
    x, gates, weights = make()
    got, wanted = (gradients(f, x, index, gates, weights, "swiglu") for f in (tiled, reference))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(a - b).max() < 1e-5 * jnp.abs(b).max()


def test_bfloat16_outputs_are_summed_before_they_are_rounded():
    rng = np.random.default_rng(3)
    index = np.stack([rng.permutation(16)[:8] for _ in range(32)])
    dispatch = make_dispatch(jnp.asarray(index), 16)
    outputs, gates = (
        jnp.asarray(rng.normal(size=(index.size, D)), jnp.bfloat16),
        rng.uniform(size=(32, 8)),
    )
    by_token = np.asarray(outputs, np.float64)[np.asarray(dispatch.inverse)].reshape(32, 8, D)
    wanted = (by_token * gates[..., None]).sum(1)
    error = np.abs(
        np.asarray(dispatch.combine(outputs, jnp.asarray(gates, jnp.float32)), np.float64) - wanted
    )
    assert (error <= 2.0**-8 * np.abs(wanted) + 1e-5).all()  # half of a unit in the last place


def test_what_is_asked_of_the_fused_feed_forward(monkeypatch):
    """The same arguments, given to another backend, must give the same experts."""
    call = moe.kernel.feed_forward
    monkeypatch.setattr(moe, "kernel_for", lambda *_: "mosaic")

    def by_reference(*arguments, implementation, needs_tail):
        return call(*arguments, implementation="reference", needs_tail=needs_tail)

    monkeypatch.setattr(moe.kernel, "feed_forward", by_reference)
    x, gates, weights = make()
    index = jnp.asarray(ROUTINGS["random"])
    found, wanted = (
        jax.jit(functools.partial(f, activation="swiglu"))(x, index, gates, weights)
        for f in (experts, reference)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_an_expert_without_tokens_has_no_gradient():
    x, gates, weights = make(num_active=1)
    _, (_, _, dweights) = gradients(experts, x, ROUTINGS["all_to_one"], gates, weights, "swiglu")
    for leaf in dweights.values():
        assert (leaf[jnp.array([0, 1, 2, 4])] == 0).all()
        assert jnp.abs(leaf[3]).max() > 0


def test_rows_past_the_last_group_give_zero():
    _, _, weights = make()
    rows = jnp.ones((7, D))
    y = grouped_ffn(rows, jnp.array([2, 0, 1, 0, 1], jnp.int32), weights, "swiglu")
    assert (y[4:] == 0).all() and (y[:4] != 0).any(1).all()
