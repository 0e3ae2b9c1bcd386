"""Products of a few tokens with matrices in 4 or 8 bits, which are read as they are stored."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.quantised_matmul import more_rows, pallas, reference
from jaxscale.kernels.quantised_matmul.packing import INPUTS

BACKENDS = ("reference", "mosaic")
# Rows of `x`. With more of them a matrix that is made whole again costs little beside the product.
MAX_ROWS = 4 * pallas.UNIT  # and as many as UNIT with something around the products
MAX_BYTES = 160 * 1024  # of rows that lie in a block's shared memory


class Norm(NamedTuple):
    """An RMSNorm of `x` before a product, with its scale [K]."""

    scale: Array
    epsilon: float


def matmul(
    x: Array,
    matrices: Sequence[tuple[Array, Array]],
    *,
    implementation: str,
    dtype: Any = None,
    norm: Norm | None = None,
    residual: Array | None = None,
    is_gated: bool = False,
    interpret: Any = False,
) -> list[Array]:
    """x @ W of each matrix W, of integers with a scale for each INPUTS inputs and output.

    Source: Frantar et al. 2024, MARLIN (arXiv 2408.11743), section 3, for weights in the order of
        the tensor cores; here each group's sum is scaled instead of its integers.
    Args:
        x: [M, K].
        matrices: of each its words and scales: integers [K, N] as `packing.pack` packs them, and
            [N / OUTPUTS, K / INPUTS, OUTPUTS]; all of the same K and bits.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs.
        dtype: of the results; None for that of `x`. Sums are in float32.
        norm: of `x`, in front of the products.
        residual: [M, N], to be added to the result.
        is_gated: the matrices are a gate and what it gates; the one result is SwiGLU's.
        interpret: JAX's parameters of interpretation, to try "mosaic" on a CPU; False compiles it.
    Returns:
        [M, N] of each.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: "mosaic" reads the words once, in one launch for all that is asked.
    """
    for words, scales in matrices:
        chunks = x.shape[1] // INPUTS
        is_fit = words.shape[1] == scales.shape[1] == chunks and words.shape[0] == scales.shape[0]
        given = f"x {x.shape}, words {words.shape} and scales {scales.shape}"
        expected = "x [M, K], words [tiles, K / 128, planes, 1024] and scales [tiles, K / 128, 64]"
        require(is_fit and x.shape[1] % INPUTS == 0, "quantised_matmul", given, expected)
    is_alone = norm is None and residual is None and not is_gated
    refusal = mosaic_refusal(x, is_alone=is_alone) if implementation == "mosaic" else None
    check_backend("quantised_matmul", implementation, BACKENDS, refusal)
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    scale, epsilon = (None, 0.0) if norm is None else norm
    settings = dict(dtype=dtype, epsilon=epsilon, residual=residual, is_gated=is_gated)
    if implementation == "reference":
        return reference.matmul(x, matrices, scale=scale, **settings)
    if is_alone and not fits_a_block(x):
        return more_rows.matmul(x, tuple(matrices), dtype=dtype, interpret=interpret)
    return pallas.matmul(x, tuple(matrices), scale=scale, **settings, interpret=interpret)


def fits_a_block(x: Array) -> bool:
    """Whether rows x [M, K] can have a norm, a residual or a gate around their products."""
    return x.shape[0] <= pallas.UNIT and x.size * x.dtype.itemsize <= MAX_BYTES


def mosaic_refusal(x: Array, *, is_alone: bool = True) -> str | None:
    """What "mosaic" would need to compute the request, as the text of an error, or None.

    Args:
        x: [M, K].
        is_alone: whether nothing is around the products.
    """
    if x.dtype != jnp.bfloat16:
        return f"x of bfloat16, but it is {x.dtype}"
    if x.shape[0] > MAX_ROWS:
        return f"at most {MAX_ROWS} rows, but x has {x.shape[0]}"
    if not (is_alone or fits_a_block(x)):
        return f"at most {pallas.UNIT} rows of {MAX_BYTES} bytes, but x is {x.shape}"
    if jax.__version_info__ < (0, 11):
        return f"jax >= 0.11, but this is {jax.__version__}"
    return None
