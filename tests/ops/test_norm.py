"""Norms against their formulas in float64, and the type in which they work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxscale.kernels import device
from jaxscale.kernels.rms_norm import reference
from jaxscale.ops import norm
from jaxscale.ops.norm import layer_norm, residual_norm, rms_norm

X = np.random.default_rng(0).normal(2, 3, (2, 3, 16))
SCALE, BIAS = np.random.default_rng(1).normal(size=(2, 16))


def run(kind, x, scale, bias):
    return (
        rms_norm(x, scale, epsilon=1e-3)
        if kind == "rms"
        else layer_norm(x, scale, bias, epsilon=1e-3)
    )


def formula(kind, x):
    if kind == "rms":
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-3) * SCALE
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * SCALE + BIAS


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_forward_equals_the_formula(kind, dtype, tolerance):
    x, scale, bias = (jnp.asarray(a, dtype) for a in (X, SCALE, BIAS))
    y = run(kind, x, scale, bias)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y.astype("float32"), formula(kind, X), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradient_equals_finite_differences(kind):
    with jax.enable_x64(True):
        f = jax.jit(functools.partial(run, kind))
        check_grads(f, (X, SCALE, BIAS), order=1, modes=["rev"])


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    "transform", [jax.jit, jax.checkpoint, lambda f: jax.vmap(f, (0, None, None))]
)
def test_gradient_is_that_of_the_formula(transform, kind):
    def plain(x, scale, bias):
        mean = x.mean(-1, keepdims=True) if kind == "layer" else 0
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) * (variance + 1e-3) ** -0.5 * scale + (bias if kind == "layer" else 0)

    def gradient(f):
        def total(*arguments):
            return jnp.sin(transform(f)(*arguments)).sum()

        return jax.jit(jax.grad(total, (0, 1, 2)))(X, SCALE, BIAS)

    with jax.enable_x64(True):
        got, wanted = gradient(functools.partial(run, kind)), gradient(plain)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, wanted)


@pytest.mark.parametrize(
    ("shape", "is_taken"),
    [((2, 3, 128), True), ((2, 3, 96), False), ((2, 0, 128), False)],
    ids=["whole", "odd", "empty"],
)
def test_on_a_hopper_gpu_the_kernel_is_taken_where_it_can_be(monkeypatch, shape, is_taken):
    """Its slow twin stands for it.

    Results and gradients keep the residual's shape and are those of the plain norm.
    """
    taken = []

    def twin(x, scale, epsilon):
        taken.append(x.shape)
        return x, reference.rms_norm(x, scale, epsilon)

    monkeypatch.setattr(device, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(
        norm.kernel, "_by_kernel", lambda x, scale, epsilon, *_: twin(x, scale, epsilon)
    )
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    x = jax.random.normal(jax.random.key(0), shape).astype("bfloat16")
    scale = jax.random.normal(jax.random.key(1), shape[-1:])

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, x, scale):
        results, pullback = jax.vjp(f, x, scale)
        return *results, *pullback((jnp.cos(x), jnp.sin(x)))

    got = both(lambda x, scale: residual_norm(x, scale, epsilon=1e-3), x, scale)
    wanted = both(lambda x, scale: (x, rms_norm(x, scale, epsilon=1e-3)), x, scale)
    assert taken == ([(6, 128)] if is_taken else [])
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=1e-2, atol=1e-2)


def test_rms_norm_keeps_its_input_alone():
    """A row's root mean square, if kept too, would have the forward read its input twice."""
    x, scale = jnp.asarray(X), jnp.asarray(SCALE)
    kept = jax.tree.leaves(jax.vjp(lambda *a: rms_norm(*a, epsilon=1e-3), x, scale)[1])
    assert {leaf.shape for leaf in kept} == {x.shape, scale.shape}


def test_layer_norm_without_bias():
    x = jnp.asarray(X)
    without, zero = (layer_norm(x, SCALE, bias, epsilon=1e-3) for bias in (None, np.zeros(16)))
    np.testing.assert_allclose(without, zero, rtol=1e-6)


def test_statistics_are_not_taken_in_bfloat16():
    """The mean of 4,096 equal numbers; a sum in bfloat16 would stop at 256 of them."""
    y = rms_norm(jnp.full((1, 4096), 3.0, jnp.bfloat16), jnp.ones(4096, jnp.bfloat16), epsilon=0.0)
    assert (y == 1).all()
