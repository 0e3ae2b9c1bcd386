"""Rotary positions against complex rotation, and what they are made for: only distances matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.rope import rope

X = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype("float32")
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])


def rotated(x, positions, theta):
    """Pairs as complex numbers, multiplied by e^(i position theta^(-2j/H)), in float64."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_equals_complex_rotation(theta, dtype, tolerance):
    y = rope(jnp.asarray(X, dtype), POSITIONS, theta=theta)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y.astype("float32"), rotated(X, POSITIONS, theta), atol=tolerance, rtol=tolerance
    )


def test_scores_depend_on_the_distance_alone():
    q, k = X[:, :, :1], X[:, :, 1:2]
    scores = [
        jnp.einsum(
            "btnh,bsnh->bts",
            rope(q, POSITIONS + shift, theta=1e4),
            rope(k, POSITIONS + shift, theta=1e4),
        )
        for shift in (0, 1000)
    ]
    np.testing.assert_allclose(*scores, atol=2e-3)


def test_the_gradient_pads_nothing():
    """Two halves joined would have the gradient of two padded halves and their sum."""
    gradient = jax.make_jaxpr(jax.grad(lambda x: rope(x, POSITIONS, theta=1e4).sum()))(
        jnp.asarray(X)
    )
    assert "pad" not in {eqn.primitive.name for eqn in gradient.jaxpr.eqns}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_positions_keep_their_angles(dtype):
    """At position 131,000 an angle of float32 is good to 2^-8 of a radian, whatever the type of x.

    bfloat16 angles would be off by hundreds of turns.
    """
    x = jnp.ones((1, 1, 1, 128), dtype)
    y = rope(x, jnp.array([[131_000]]), theta=5e5).astype("float32")
    wanted = rotated(np.ones((1, 1, 1, 128)), np.array([[131_000]]), 5e5)
    np.testing.assert_allclose(y, wanted, atol=2**-7 if dtype == "float32" else 2**-6)


def test_equals_transformers():
    llama = pytest.importorskip(
        "transformers.models.llama.modeling_llama", reason="needs torch, which is optional"
    )
    torch = pytest.importorskip("torch", reason="transformers' rotation is written in torch")
    angles = POSITIONS[..., None] * 1e4 ** (-2 * np.arange(4) / 8)
    cos, sin = (torch.tensor(f(np.concatenate([angles, angles], -1))) for f in (np.cos, np.sin))
    x = torch.tensor(X).permute(0, 2, 1, 3)
    wanted = llama.apply_rotary_pos_emb(x, x, cos, sin)[0].permute(0, 2, 1, 3).numpy()
    np.testing.assert_allclose(rope(X, POSITIONS, theta=1e4), wanted, atol=1e-5)
