"""RMSNorm and LayerNorm over the model dim."""

import jax
from jax import lax

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


def rms_norm(x: Array, scale: Array, *, epsilon: float) -> Array:
    """x / rms(x) * scale over the last dim.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    Args:
        x: [..., D]; the mean is taken in at least float32.
        scale: [D].
        epsilon: added to the mean square.
    Returns:
        [..., D] in the type of `x`; has no forward-mode derivative.
    """
    return _rms_norm(x, scale, epsilon)


def _formula(x: Array, scale: Array, epsilon: float) -> Array:
    x32 = accumulator(x)
    inverse = lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + epsilon)
    return (x32 * inverse * accumulator(scale)).astype(x.dtype)


def _backward(epsilon: float, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Makes the mean square again, in the pass of its own sum: if it were kept, the forward would read `x` twice."""
    x, scale = kept
    return jax.vjp(lambda *arguments: _formula(*arguments, epsilon), lax.optimization_barrier(x), scale)[1](dy)


_rms_norm = jax.custom_vjp(_formula, nondiff_argnums=(2,))
_rms_norm.defvjp(lambda x, scale, epsilon: (_formula(x, scale, epsilon), (x, scale)), _backward)


def layer_norm(x: Array, scale: Array, bias: Array | None, *, epsilon: float) -> Array:
    """(x - mean) / std * scale + bias over the last dim.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450), section 3.
    Args:
        x: [..., D]; statistics in at least float32.
        scale: [D].
        bias: [D] or None.
        epsilon: added to the variance.
    Returns:
        [..., D] in the type of `x`.
    """
    x32 = accumulator(x)
    centred = x32 - x32.mean(-1, keepdims=True)
    y = centred * lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * accumulator(scale)
    return (y if bias is None else y + accumulator(bias)).astype(x.dtype)
