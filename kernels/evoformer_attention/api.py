"""The Evoformer's attention, with a bias of a row's keys and one of all rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.evoformer_attention import reference
from jaxscale.kernels.evoformer_attention.varying import alike
from jaxscale.kernels.triton_call import missing

BACKENDS = ("reference", "triton")
# Of heads that have block sizes of their own; others take those of the next.
WIDTHS = (32, 64, 128)
HALVES = (jnp.bfloat16, jnp.float16)
Operands = tuple[Array, Array, Array, Array | None, Array | None]


def evoformer_attention(
    q: Array,
    k: Array,
    v: Array,
    mask_bias: Array | None = None,
    pair_bias: Array | None = None,
    *,
    implementation: str,
    interpret: Any = False,
) -> Array:
    """softmax(q k^T / sqrt(H) + mask bias + pair bias) v, within each row and head.

    A query all of whose logits are -inf has output 0 and adds 0 to every gradient. No sum depends
    on the order in which programs end: the same bits come from run to run.

    Source: Song et al. 2023, DeepSpeed4Science (arXiv 2310.04610), DS4Sci_EvoformerAttention; Dao
        2023, FlashAttention-2 (arXiv 2307.08691).
    Args:
        q: [B, M, T, N, H].
        k, v: [B, M, S, N, H].
        mask_bias: [B, M, 1, 1, S], of any floating type; None is 0.
        pair_bias: [B, 1, N, T, S], of any floating type; None is 0.
        implementation: one of BACKENDS; "triton" is for NVIDIA GPUs since Ampere.
        interpret: what runs a Triton kernel on the host, as for `triton_call.call`; False compiles
            it.
    Returns:
        [B, M, T, N, H] in the type of `q`; logits, softmax and sums are in float32.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: 4 B M N T S H FLOPs. The backward takes 18 B M N T S H, without a pair bias 14. It holds
        the mask bias's gradient N times in float32, and the pair bias's once, or as often as there
        are parts of the rows: then these take 32 MiB or less.
    """
    _check_shapes(q, k, v, mask_bias, pair_bias)
    check_backend("evoformer_attention", implementation, BACKENDS, refusal(implementation, q))
    operands = q, k, v, mask_bias, pair_bias
    if implementation == "reference":
        return reference.attend(*operands)
    if not q.size or not k.size:
        return jnp.zeros_like(q)
    return _by_kernel(alike(operands), interpret)


def _check_shapes(
    q: Array,
    k: Array,
    v: Array,
    mask_bias: Array | None,
    pair_bias: Array | None,
) -> None:
    """Raises ValueError for shapes and types that do not fit."""
    batch, rows, queries, heads, width = q.shape
    keys = k.shape[2]
    is_fit = k.shape == v.shape == (batch, rows, keys, heads, width)
    given = f"q {q.dtype}{q.shape}, k {k.dtype}{k.shape} and v {v.dtype}{v.shape}"
    expected = "[B, M, T, N, H] and twice [B, M, S, N, H] of one type"
    is_fit = is_fit and q.dtype == k.dtype == v.dtype
    require(is_fit, "evoformer_attention", given, expected)
    shapes = (batch, rows, 1, 1, keys), (batch, 1, heads, queries, keys)
    for bias, shape in zip((mask_bias, pair_bias), shapes):
        is_fit = bias is None or bias.shape == shape
        require(is_fit, "evoformer_attention", f"a bias {getattr(bias, 'shape', None)}", shape)


def refusal(implementation: str, q: Array) -> str | None:
    """What a kernel would need to compute the request, as the text of an error.

    None when it can, and for what is no kernel. Shape and type are enough.
    """
    if implementation == "reference":
        return None
    if q.dtype not in HALVES:
        return f"q, k and v all bfloat16 or all float16, but they are {q.dtype}"
    if q.shape[-1] > max(WIDTHS):
        return f"heads of width <= {max(WIDTHS)}, but they are of {q.shape[-1]}"
    return missing()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_kernel(operands: Operands, interpret: Any) -> Array:
    o, _ = _forward(operands, interpret)
    return o


def _forward(operands: Operands, interpret: Any) -> tuple[Array, Any]:
    # Triton is optional, so it is imported where it is used.
    from jaxscale.kernels.evoformer_attention.triton_forward import forward

    found = forward(*_readable(operands), interpret=interpret)
    # JAX does not know which axes of a `shard_map` a kernel's results vary over.
    _, (o, top, total) = alike((operands, found))
    return o, (operands, o, top, total)


def _backward(
    interpret: Any,
    residuals: Any,
    do: Array,
) -> tuple[Operands]:
    from jaxscale.kernels.evoformer_attention.triton_backward import backward

    operands, o, top, total = residuals
    delta = jnp.einsum("bmtnh,bmtnh->bmnt", o, do, preferred_element_type=jnp.float32)
    found = backward(_readable(operands), do, top, total, delta, interpret=interpret)
    _, gradients = alike((operands, found))
    return (jax.tree.map(lambda x, dx: dx.astype(x.dtype), operands, gradients),)


_by_kernel.defvjp(_forward, _backward)


def _readable(operands: Operands) -> Operands:
    """With biases in a type that every GPU has."""
    *qkv, mask_bias, pair_bias = operands
    biases = (
        bias if bias is None or bias.dtype in HALVES else bias.astype(jnp.float32)
        for bias in (mask_bias, pair_bias)
    )
    return *qkv, *biases
