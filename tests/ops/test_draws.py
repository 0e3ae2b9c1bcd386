"""What tokens draw: numbers of their own, never 0 or 1, and dropout that keeps the mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.ops import moe
from jaxscale.ops.draws import (
    EXPERT,
    PURPOSES,
    ROUTER,
    Draws,
    Dropout,
    scramble,
    uniform,
    with_token_keys,
)

ROWS, LENGTH = 8, 16


def make_draws(key=0, layer=0):
    batch = with_token_keys({"tokens": jnp.zeros((ROWS, LENGTH), jnp.int32)}, jax.random.key(key))
    return Draws(batch["token_keys"], layer)


def test_no_number_is_0_or_1():
    """Gumbel's noise is not finite there.

    A word in 2^24 would give a 1 if the largest were rounded.
    """
    got = np.asarray(uniform(jnp.asarray([0, 2**32 - 1, 2**31], jnp.uint32)))
    assert got[0] > 0 and got[1] < 1 and abs(got[2] - 0.5) < 1e-6


def test_numbers_are_uniform_and_differ_by_step_token_layer_and_purpose():
    drawn = [
        make_draws(key, layer).numbers(purpose, 7)
        for key in (0, 1)
        for layer in (0, 1)
        for purpose in PURPOSES
    ]
    every = np.stack(drawn)
    assert every.shape[1:] == (ROWS, LENGTH, 7)
    assert len(np.unique(every)) > 0.999 * every.size
    np.testing.assert_allclose(np.histogram(every, 8, (0, 1))[0] / every.size, 1 / 8, atol=0.01)


def test_the_words_are_threefrys():
    """The published known answers of Threefry-2x32 with 20 rounds."""
    ones = 2**32 - 1
    for word, wanted in ((0, (0x6B200159, 0x99BA4EFE)), (ones, (0x1CB996FC, 0xBB002BE7))):
        each = jnp.asarray(word, jnp.uint32)
        assert tuple(int(got) for got in scramble(jnp.stack([each, each]), each, each)) == wanted


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    keys = make_draws().streams(EXPERT, jnp.asarray([[[3]]]))
    got = np.asarray(Dropout(keys, 0.3)(jnp.full((ROWS, LENGTH, 1, 500), 7.0)))
    np.testing.assert_allclose(np.unique(got), [0, 10], rtol=1e-6)
    np.testing.assert_allclose((got == 0).mean(), 0.3, atol=0.01)


def test_a_part_of_a_vector_drops_what_the_whole_drops_there():
    keys, x = make_draws().streams(EXPERT, jnp.asarray(0)[None]), jnp.ones((ROWS, LENGTH, 1, 12))
    whole = Dropout(keys, 0.5)(x)
    part = Dropout(keys, 0.5, first=7)(x[..., 7:])
    np.testing.assert_array_equal(part, whole[..., 7:])


def test_experts_with_dropout_equal_their_twin():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        weights = {
            n: jnp.asarray(rng.normal(size=(4, 3, 6) if n != "down" else (4, 6, 3)))
            for n in ("up", "down")
        }
        x, index = (
            jnp.asarray(rng.normal(size=(ROWS, LENGTH, 3))),
            jnp.asarray(rng.integers(0, 2, (ROWS, LENGTH, 1))),
        )
        index = jnp.concatenate([index, index + 2], -1)
        gates = jnp.asarray(rng.uniform(size=index.shape))
        dropout = Dropout(make_draws().streams(EXPERT, index), 0.4)

        def run(experts):
            def loss(x, weights):
                return jnp.sin(experts(x, index, gates, weights, "gelu", dropout=dropout)).sum()

            return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, weights)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9),
            run(moe.experts),
            run(moe.reference),
        )


def test_a_kernel_that_makes_the_activation_itself_is_not_asked_to_drop(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the fused feed-forward drops nothing")

    monkeypatch.setattr(moe, "kernel_for", lambda *_: "mosaic")
    monkeypatch.setattr(moe.kernel, "feed_forward", refuse)
    monkeypatch.setattr(
        moe.kernel, "grouped_matmul", lambda rows, w, group_sizes, implementation: rows @ w[0]
    )
    weights = {name: jnp.ones((1, 4, 4)) for name in ("gate", "up", "down")}
    dropout = Dropout(jnp.zeros((5, 2), jnp.uint32), 0.5)
    rows = jnp.ones((5, 4))
    got = moe.grouped_ffn(rows, jnp.asarray([5]), weights, "swiglu", dropout)
    always = dataclasses.replace(dropout, rate=0.0)
    assert (got != moe.grouped_ffn(rows, jnp.asarray([5]), weights, "swiglu", always)).any()


def test_the_numbers_of_a_token_do_not_depend_on_how_many_are_asked():
    draws = make_draws()
    np.testing.assert_array_equal(draws.numbers(ROUTER, 9)[..., :4], draws.numbers(ROUTER, 4))
