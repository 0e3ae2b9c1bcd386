"""RMSNorm and LayerNorm over the model dim."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.rms_norm import api as kernel
from jaxscale.kernels.rms_norm import reference
from jaxscale.ops.by_row import ByRow, norm_with_gradients_of
from jaxscale.ops.device import kernel_for
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array

logger = logging.getLogger(__name__)


def rms_norm(
    x: Array,
    scale: Array | ByRow,
    *,
    epsilon: float,
) -> Array:
    """x / rms(x) * scale over the last dim.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    Args:
        x: [..., D]; the mean is taken in at least float32.
        scale: [D]; for the same bits beside any other rows see `ops.by_row`.
        epsilon: added to the mean square.
    Returns:
        [..., D] in the type of `x`; has no forward-mode derivative.
    """
    if isinstance(scale, ByRow):
        return norm_with_gradients_of(rms_norm, epsilon)(x, scale.array)
    return _rms_norm(x, scale, epsilon)


def _forward(
    x: Array,
    scale: Array,
    epsilon: float,
) -> tuple[Array, tuple[Array, Array]]:
    return reference.rms_norm(x, scale, epsilon), (x, scale)


def _backward(
    epsilon: float,
    residuals: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, Array]:
    x, scale = residuals

    def norm(x: Array, scale: Array) -> Array:
        return reference.rms_norm(x, scale, epsilon)

    # Recompute mean(x^2): saving it would make XLA read x twice in the forward. The barrier keeps
    # XLA from finding that the forward has computed it.
    x = lax.optimization_barrier(x)
    _, pullback = jax.vjp(norm, x, scale)
    return pullback(dy)


_rms_norm = jax.custom_vjp(reference.rms_norm, nondiff_argnums=(2,))
_rms_norm.defvjp(_forward, _backward)


def residual_norm(
    x: Array,
    scale: Array | ByRow,
    *,
    epsilon: float,
) -> tuple[Array, Array]:
    """(x, rms_norm(x)): a residual and its norm, whose gradients of `x` are added in one pass.

    The caller must go on with the residual that is returned, or its gradient misses the sum. On a
    GPU the backward is a kernel if one takes rows of this size and type, and the log says so. The
    kernel is differentiable once, and on several devices it runs in a manual region only. Elsewhere
    the backward is that of `rms_norm`.

    Args:
        x, scale, epsilon: as for `rms_norm`.
    """
    if isinstance(scale, ByRow):
        return norm_with_gradients_of(residual_norm, epsilon)(x, scale.array)
    rows = x.reshape(-1, x.shape[-1])
    family = kernel_for(kernel, rows)
    if family is None:
        return x, rms_norm(x, scale, epsilon=epsilon)
    logger.info("norm: backend %s for x%s %s", family, x.shape, x.dtype)
    same, y = kernel.residual_norm(rows, scale, epsilon=epsilon, implementation=family)
    return same.reshape(x.shape), y.reshape(x.shape)


def layer_norm(
    x: Array,
    scale: Array,
    bias: Array | None,
    *,
    epsilon: float,
) -> Array:
    """(x - mean) / std * scale + bias over the last dim.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450), section 3.
    Args:
        x: [..., D]; statistics in at least float32.
        scale: [D].
        bias: [D] or None.
        epsilon: added to the variance.
    Returns:
        [..., D] in the type of `x`; has no forward-mode derivative.
    """
    return _layer_norm(x, scale, bias, epsilon)


def _moments(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Mean and 1 / std [..., 1] of each row."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return mean, lax.rsqrt(variance + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(
    x: Array,
    scale: Array,
    bias: Array | None,
    epsilon: float,
) -> Array:
    x_wide = accumulator(x)
    mean, inverse = _moments(x_wide, epsilon)
    y = (x_wide - mean) * inverse * accumulator(scale)
    if bias is not None:
        y = y + accumulator(bias)
    return y.astype(x.dtype)


def _layer_forward(
    x: Array,
    scale: Array,
    bias: Array | None,
    epsilon: float,
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _layer_norm(x, scale, bias, epsilon), (x, scale, bias)


def _layer_backward(
    epsilon: float,
    residuals: tuple[Array, Array, Array | None],
    dy: Array,
) -> tuple[Array, Array, Array | None]:
    """The barriers give the sums over rows a pass of their own.

    Without them XLA joins the moments with the products that are summed, which it then writes and
    reads in float32.
    """
    x, scale, bias = residuals
    x_wide, dy = accumulator(lax.optimization_barrier(x)), accumulator(dy)
    mean, inverse = lax.optimization_barrier(_moments(x_wide, epsilon))

    def normed() -> Array:
        # Written out for each use: a zero bubble would keep one value for both in float32.
        return (x_wide - mean) * inverse

    rows = tuple(range(x.ndim - 1))
    dscale = (dy * normed()).sum(rows)
    dbias = None if bias is None else dy.sum(rows).astype(bias.dtype)
    dnormed = dy * accumulator(scale)
    of_mean = dnormed.mean(-1, keepdims=True)
    of_deviation = (dnormed * normed()).mean(-1, keepdims=True)
    dx = inverse * (dnormed - of_mean - normed() * of_deviation)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias


_layer_norm.defvjp(_layer_forward, _layer_backward)
