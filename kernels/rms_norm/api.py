"""RMSNorm beside its input, whose gradient the backward adds up in one pass over memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.rms_norm import pallas, reference

BACKENDS = ("reference", "mosaic")


def residual_norm(
    x: jax.Array, scale: jax.Array, *, epsilon: float, implementation: str, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """(x, x / rms(x) * scale): a residual and its norm, together so that their gradients to `x` meet in one kernel.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    Args:
        x: [rows, D]; the mean is taken in at least float32.
        scale: [D].
        epsilon: added to the mean square.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs, and a kernel in the backward
            only: the forward is one pass as XLA makes it.
        interpret: JAX's parameters of interpretation, to try "mosaic" on a CPU; False compiles it.
    Returns:
        (x, norm [rows, D] in the type of `x`).
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: in the backward "mosaic" reads `x` and both cotangents and writes one gradient, 8 bytes an
        element, and a part of the scale's gradient in float32 for each of up to 528 blocks.
    """
    given = f"x {x.shape} and scale {scale.shape}"
    require(x.ndim == 2 and scale.shape == x.shape[1:], "residual_norm", given, "[rows, D] and [D]")
    check_backend("residual_norm", implementation, BACKENDS, mosaic_refusal(x))
    if implementation == "mosaic":
        return _mosaic(x, scale, epsilon, interpret)
    return x, reference.rms_norm(x, scale, epsilon)


def mosaic_refusal(x: jax.Array) -> str | None:
    """What of the request "mosaic" cannot do, as the text of an error; None when it can. Shapes are enough."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x bfloat16 or float16, but it is {x.dtype}"
    if len(x) == 0:
        return "a row at least"
    if x.shape[-1] % pallas.THREADS or x.shape[-1] > pallas.MAX_WIDTH:
        return f"D % {pallas.THREADS} == 0 and D <= {pallas.MAX_WIDTH}, but D = {x.shape[-1]}"
    if jax.__version_info__ < (0, 11):  # which cannot load a part of a reference in a given layout
        return f"jax >= 0.11, but this is {jax.__version__}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _mosaic(
    x: jax.Array, scale: jax.Array, epsilon: float, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    return x, reference.rms_norm(x, scale, epsilon)


def _backward(
    epsilon: float,
    interpret: Any,
    kept: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, ...],
):
    x, scale = kept
    dx, dscale = pallas.backward(x, scale, *cotangents, epsilon=epsilon, interpret=interpret)
    return dx, dscale.astype(scale.dtype)


_mosaic.defvjp(
    lambda x, scale, epsilon, interpret: (_mosaic(x, scale, epsilon, interpret), (x, scale)),
    _backward,
)
