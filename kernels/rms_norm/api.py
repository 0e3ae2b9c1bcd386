"""RMSNorm together with its input, whose gradient the backward adds up in one pass over memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.rms_norm import pallas, reference
from jaxscale.kernels.triton_call import missing

BACKENDS = ("reference", "mosaic", "triton")
TRITON_MAX_WIDTH = 8192  # elements of a row, beyond which a program's registers do not hold it


def residual_norm(
    x: Array,
    scale: Array,
    *,
    epsilon: float,
    implementation: str,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """(x, x / rms(x) * scale): a residual and its norm.

    They are one operation so that their gradients of `x` are added up in one kernel.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    Args:
        x: [rows, D]; the mean is taken in at least float32.
        scale: [D].
        epsilon: added to the mean square.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs, "triton" for Ampere and newer.
            They have a kernel in the backward only, because XLA computes the forward in one pass.
        interpret: JAX's parameters of interpretation, to try a kernel on a CPU; False compiles it.
    Returns:
        (x, norm [rows, D] in the type of `x`).
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: in the backward a kernel reads `x` and both cotangents and writes one gradient, 8 bytes an
        element, and a part of the scale's gradient in float32 for each of up to 528 blocks.
    """
    given = f"x {x.shape} and scale {scale.shape}"
    is_fit = x.ndim == 2 and scale.shape == x.shape[1:]
    require(is_fit, "residual_norm", given, "[rows, D] and [D]")
    check_backend("residual_norm", implementation, BACKENDS, refusal(implementation, x))
    if implementation == "reference":
        return x, reference.rms_norm(x, scale, epsilon)
    return _by_kernel(x, scale, epsilon, implementation, interpret)


def refusal(implementation: str, x: Array) -> str | None:
    """What a kernel would need to compute the request, as the text of an error.

    None when it can, and for what is no kernel. Shapes and types are enough.
    """
    if implementation == "reference":
        return None
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x bfloat16 or float16, but it is {x.dtype}"
    if len(x) == 0:
        return "a row at least"
    width = x.shape[-1]
    if implementation == "triton":
        is_fit = width <= TRITON_MAX_WIDTH
        return missing() if is_fit else f"D <= {TRITON_MAX_WIDTH}, but D = {width}"
    if width % pallas.THREADS or width > pallas.MAX_WIDTH:
        return f"D % {pallas.THREADS} == 0 and D <= {pallas.MAX_WIDTH}, but D = {width}"
    # jax 0.10 cannot load a part of a reference in a given layout.
    if jax.__version_info__ < (0, 11):
        return f"jax >= 0.11, but this is {jax.__version__}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_kernel(
    x: Array,
    scale: Array,
    epsilon: float,
    implementation: str,
    interpret: Any,
) -> tuple[Array, Array]:
    return x, reference.rms_norm(x, scale, epsilon)


def _forward(
    x: Array,
    scale: Array,
    epsilon: float,
    implementation: str,
    interpret: Any,
):
    return _by_kernel(x, scale, epsilon, implementation, interpret), (x, scale)


def _backward(
    epsilon: float,
    implementation: str,
    interpret: Any,
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array],
):
    x, scale = residuals
    if implementation == "triton":
        # Triton is optional, so it is imported where it is used.
        from jaxscale.kernels.rms_norm import triton as kernel
    else:
        kernel = pallas
    settings = dict(epsilon=epsilon, interpret=interpret)
    dx, dscale = kernel.backward(x, scale, *cotangents, **settings)
    return dx, dscale.astype(scale.dtype)


_by_kernel.defvjp(_forward, _backward)
