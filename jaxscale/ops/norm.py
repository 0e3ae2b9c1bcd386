"""RMSNorm and LayerNorm over the model dim."""

import logging

import jax
from jax import lax

from jaxscale.kernels.rms_norm import api as kernel
from jaxscale.kernels.rms_norm import reference
from jaxscale.ops.device import is_hopper
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array

logger = logging.getLogger(__name__)


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


def _backward(epsilon: float, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Makes the mean square again, in the pass of its own sum: if it were kept, the forward would read `x` twice."""
    x, scale = kept
    x = lax.optimization_barrier(x)
    return jax.vjp(lambda x, scale: reference.rms_norm(x, scale, epsilon), x, scale)[1](dy)


_rms_norm = jax.custom_vjp(reference.rms_norm, nondiff_argnums=(2,))
_rms_norm.defvjp(
    lambda x, scale, epsilon: (reference.rms_norm(x, scale, epsilon), (x, scale)), _backward
)


def residual_norm(x: Array, scale: Array, *, epsilon: float) -> tuple[Array, Array]:
    """(x, rms_norm(x)): where the residual goes on from its first part, both gradients of `x` are added in one pass.

    On Hopper GPUs the backward is a kernel where that takes such rows, and says so in the log:
    differentiable once, and on several devices for a manual region. Elsewhere it is `rms_norm`'s;
    arguments as there.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not is_hopper() or kernel.mosaic_refusal(rows) is not None:
        return x, rms_norm(x, scale, epsilon=epsilon)
    logger.info("norm: backend mosaic for x%s %s", x.shape, x.dtype)
    same, y = kernel.residual_norm(rows, scale, epsilon=epsilon, implementation="mosaic")
    return same.reshape(x.shape), y.reshape(x.shape)


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
    y = (
        centred
        * lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
        * accumulator(scale)
    )
    return (y if bias is None else y + accumulator(bias)).astype(x.dtype)
