"""The backward of RMSNorm for any NVIDIA GPU since Ampere, as a Triton kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.triton_call import blocks_of, call

PROGRAMS = 528  # each of which sums up a part of the scale's gradient


@triton.jit
def _backward(
    x,
    scale,
    dx,
    dy,
    out,
    dscale,
    NUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Every so many-th row, one at a time."""
    column = tl.arange(0, PADDED)
    is_column = column < WIDTH
    scale_row = tl.load(scale + column, mask=is_column, other=0.0).to(tl.float32)
    of_scale = tl.zeros((PADDED,), tl.float32)
    for row in range(tl.program_id(0), NUM_ROWS, tl.num_programs(0)):
        at = (tl.zeros((PADDED,), tl.int64) + row) * WIDTH + column
        x_row = tl.load(x + at, mask=is_column, other=0.0).to(tl.float32)
        dx_row = tl.load(dx + at, mask=is_column, other=0.0).to(tl.float32)
        dy_row = tl.load(dy + at, mask=is_column, other=0.0).to(tl.float32)
        dnormal = dy_row * scale_row
        # Both sums are of what was loaded, so that neither waits for the other.
        square = tl.sum(x_row * x_row, 0)
        slope = tl.sum(dnormal * x_row, 0)
        inverse = 1 / tl.sqrt(square / WIDTH + EPSILON)
        of_inverse = slope * inverse * inverse / WIDTH * x_row
        of_x = dx_row + inverse * (dnormal - of_inverse)
        tl.store(out + at, of_x.to(out.dtype.element_ty), mask=is_column)
        of_scale += dy_row * x_row * inverse
    tl.store(dscale + tl.program_id(0) * WIDTH + column, of_scale, mask=is_column)


def backward(
    x: Array,
    scale: Array,
    dx: Array,
    dy: Array,
    *,
    epsilon: float,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Gradients of `x` and `scale`; arguments and results as those of `pallas.backward`."""
    num_rows, width = x.shape
    num_programs = min(num_rows, PROGRAMS)
    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype)
    dscale_type = jax.ShapeDtypeStruct((num_programs, width), jnp.float32)
    out, dscale = call(
        _backward,
        *(x, scale, dx, dy),
        out_type=(out_type, dscale_type),
        grid=(num_programs,),
        blocks=blocks_of("rms_norm"),
        interpret=interpret,
        NUM_ROWS=num_rows,
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        EPSILON=epsilon,
    )
    return out, dscale.sum(0)
