"""Attention within an alignment and within pairs: rows, columns, and both nodes of a triangle.

Each returns what is added to its input; T and S are residues, or sequences within a column.
"""

import jax
import jax.numpy as jnp

from jaxscale.ops.attention.evoformer import EvoformerAttention
from jaxscale.ops.linear import linear
from jaxscale.ops.norm import layer_norm
from jaxscale.types import Array, Params

EPSILON = 1e-5


def project(
    params: Params,
    name: str,
    equation: str,
    x: Array,
) -> Array:
    """The product with a matrix, in the type of `x`, and its bias where it has one."""
    y = linear(equation, x, params[name].astype(x.dtype))
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(y.dtype)


def norm(params: Params, x: Array) -> Array:
    """LayerNorm over the last dim."""
    return layer_norm(x, params["scale"], params["bias"], epsilon=EPSILON)


def gated_attention(
    params: Params,
    x: Array,
    mask: Array,
    pair_bias: Array | None,
    attention: EvoformerAttention,
) -> Array:
    """Attention within each row of `x`, whose heads' outputs a sigmoid of the query's input gates.

    Source: Jumper et al. 2021, supplement, algorithm 7, lines 2 to 7.
    Args:
        params: q, k, v, gate and o with their biases, as `evoformer_table` has them.
        x: [B, M, T, D], normed.
        mask: [B, M, T], above 0 for a key that is seen; if a row has none, its attention is 0.
        pair_bias: [B, T, S, N], or None.
        attention: the backend.
    Returns:
        [B, M, T, D].
    """
    q, k, v, gate = (
        project(params, name, "bmtd,dnh->bmtnh", x) for name in ("q", "k", "v", "gate")
    )
    mask_bias = jnp.where(mask > 0, 0.0, -jnp.inf)[:, :, None, None, :]
    if pair_bias is not None:
        pair_bias = jnp.moveaxis(pair_bias, 3, 1)[:, None]
    o = attention(q, k, v, mask_bias, pair_bias)
    return project(params, "o", "bmtnh,nhd->bmtd", o * jax.nn.sigmoid(gate))


def msa_row_attention(
    params: Params,
    msa: Array,
    pair: Array,
    mask: Array,
    *,
    attention: EvoformerAttention,
) -> Array:
    """Each sequence attends over its residues, biased by their pairs.

    Source: Jumper et al. 2021, supplement, algorithm 7.
    Args:
        params: of `msa_row_attention` in `evoformer_table`.
        msa: [B, M, T, D], M sequences of T residues.
        pair: [B, T, S, D of the pairs].
        mask: [B, M, T].
        attention: the backend.
    Returns:
        [B, M, T, D].
    """
    pair = norm(params["pair_norm"], pair)
    pair_bias = project(params, "pair_bias", "btsd,dn->btsn", pair)
    return gated_attention(params, norm(params["norm"], msa), mask, pair_bias, attention)


def msa_column_attention(
    params: Params,
    msa: Array,
    mask: Array,
    *,
    attention: EvoformerAttention,
) -> Array:
    """Each residue attends over the sequences.

    Source: Jumper et al. 2021, supplement, algorithm 8.
    Args: as of `msa_row_attention`, without pairs.
    """
    msa, mask = jnp.swapaxes(msa, 1, 2), jnp.swapaxes(mask, 1, 2)
    update = gated_attention(params, norm(params["norm"], msa), mask, None, attention)
    return jnp.swapaxes(update, 1, 2)


def triangle_attention(
    params: Params,
    pair: Array,
    mask: Array,
    *,
    is_ending: bool,
    attention: EvoformerAttention,
) -> Array:
    """Pairs that start at one residue attend to one another, or those that end there.

    The second is the first on the transposed pairs.

    Source: Jumper et al. 2021, supplement, algorithms 13 and 14.
    Args:
        params: of a `triangle_attention` in `evoformer_table`.
        pair: [B, T, S, D], T = S.
        mask: [B, T, S].
        is_ending: whether pairs share the residue that they end at.
        attention: the backend.
    Returns:
        [B, T, S, D].
    """
    if is_ending:
        pair, mask = jnp.swapaxes(pair, 1, 2), jnp.swapaxes(mask, 1, 2)
    pair = norm(params["norm"], pair)
    pair_bias = project(params, "pair_bias", "btsd,dn->btsn", pair)
    update = gated_attention(params, pair, mask, pair_bias, attention)
    return jnp.swapaxes(update, 1, 2) if is_ending else update
