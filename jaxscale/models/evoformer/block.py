"""A block of the Evoformer: its attention, and what exchanges between alignment and pairs."""

import jax
import jax.numpy as jnp

from jaxscale.models.evoformer.attention import (
    msa_column_attention,
    msa_row_attention,
    norm,
    project,
    triangle_attention,
)
from jaxscale.ops.attention.evoformer import EvoformerAttention, evoformer_attention
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, Params

OUTER_EPSILON = 1e-3


def evoformer_block(
    params: Params,
    msa: Array,
    pair: Array,
    msa_mask: Array,
    pair_mask: Array,
    *,
    attention: EvoformerAttention = evoformer_attention,
) -> tuple[Array, Array]:
    """One block, without dropout.

    A pair is masked if one of its residues is. Nothing else then depends on what masked places
    hold, and what they hold after the block means nothing.

    Source: Jumper et al. 2021, supplement, algorithm 6, lines 2 to 10.
    Args:
        params: as `evoformer_table`, of any floating type.
        msa: [B, M, T, D], M sequences of T residues; its type is the one that is computed in.
        pair: [B, T, T, D of the pairs], in the type of `msa`.
        msa_mask: [B, M, T], 1 or 0.
        pair_mask: [B, T, T], 1 or 0.
        attention: the backend.
    Returns:
        (msa, pair) in their shapes and type.
    Raises:
        InputError: shapes do not fit one another.
    """
    _check(msa, pair, msa_mask, pair_mask)
    own = params["msa_row_attention"]
    msa += msa_row_attention(own, msa, pair, msa_mask, attention=attention)
    own = params["msa_column_attention"]
    msa += msa_column_attention(own, msa, msa_mask, attention=attention)
    msa += transition(params["msa_transition"], msa)
    pair += outer_product_mean(params["outer_product_mean"], msa, msa_mask)
    for name, is_incoming in (("outgoing", False), ("incoming", True)):
        own = params[f"triangle_multiplication_{name}"]
        pair += triangle_multiplication(own, pair, pair_mask, is_incoming=is_incoming)
    for name, is_ending in (("starting", False), ("ending", True)):
        own = params[f"triangle_attention_{name}"]
        pair += triangle_attention(own, pair, pair_mask, is_ending=is_ending, attention=attention)
    pair += transition(params["pair_transition"], pair)
    return msa, pair


def transition(params: Params, x: Array) -> Array:
    """A feed-forward of each place of [B, M, T, D].

    Source: Jumper et al. 2021, supplement, algorithms 9 and 15.
    """
    x = norm(params["norm"], x)
    hidden = jax.nn.relu(project(params, "up", "bmtd,df->bmtf", x))
    return project(params, "down", "bmtf,fd->bmtd", hidden)


def outer_product_mean(params: Params, msa: Array, mask: Array) -> Array:
    """What two residues have in common in the sequences that have both.

    Source: Jumper et al. 2021, supplement, algorithm 10; as the published code, it divides by the
        number of those sequences and 0.001.
    Args:
        params: of `outer_product_mean` in `evoformer_table`.
        msa: [B, M, T, D].
        mask: [B, M, T].
    Returns:
        [B, T, S, D of the pairs].
    Cost: holds [B, T, S, F, F] in float32.
    """
    mask = mask.astype(msa.dtype)
    x = norm(params["norm"], msa)
    left, right = (
        mask[..., None] * project(params, side, "bmtd,df->bmtf", x) for side in ("left", "right")
    )
    wide = accumulator(msa).dtype
    outer = jnp.einsum("bmtf,bmsg->btsfg", left, right, preferred_element_type=wide)
    num_sequences = jnp.einsum("bmt,bms->bts", mask, mask, preferred_element_type=wide)
    update = project(params, "o", "btsfg,fgd->btsd", outer)
    return (update / (OUTER_EPSILON + num_sequences[..., None])).astype(msa.dtype)


def triangle_multiplication(
    params: Params,
    pair: Array,
    mask: Array,
    *,
    is_incoming: bool,
) -> Array:
    """Two edges of each triangle update the third.

    Source: Jumper et al. 2021, supplement, algorithms 11 and 12; a and b are left and right here.
    Args:
        params: of a `triangle_multiplication` in `evoformer_table`.
        pair: [B, T, S, D], T = S.
        mask: [B, T, S].
        is_incoming: whether both edges end at the updated edge's ends, and not start there.
    Returns:
        [B, T, S, D].
    """
    x = norm(params["norm"], pair)
    mask = mask[..., None].astype(x.dtype)

    def gated(name: str, gate: str, x: Array) -> Array:
        y = project(params, name, "btsd,df->btsf", x)
        return y * jax.nn.sigmoid(project(params, gate, "btsd,df->btsf", x))

    left, right = (mask * gated(side, f"{side}_gate", x) for side in ("left", "right"))
    equation = "bktf,bksf->btsf" if is_incoming else "btkf,bskf->btsf"
    wide = accumulator(pair).dtype
    product = jnp.einsum(equation, left, right, preferred_element_type=wide)
    product = norm(params["product_norm"], product).astype(pair.dtype)
    update = project(params, "o", "btsf,fd->btsd", product)
    return update * jax.nn.sigmoid(project(params, "gate", "btsd,dc->btsc", x))


def _check(
    msa: Array,
    pair: Array,
    msa_mask: Array,
    pair_mask: Array,
) -> None:
    """Raises InputError for shapes and types that do not fit."""
    is_square = pair.ndim == msa.ndim == 4 and pair.shape[:3] == (
        msa.shape[0],
        msa.shape[2],
        msa.shape[2],
    )
    if not is_square or msa_mask.shape != msa.shape[:3] or pair_mask.shape != pair.shape[:3]:
        given = f"msa {msa.shape}, {msa_mask.shape}, pair {pair.shape}, {pair_mask.shape}"
        expected = "msa [B, M, T, D], its mask [B, M, T], pair [B, T, T, D], its mask [B, T, T]"
        raise InputError("evoformer_block", given, expected)
    if msa.dtype != pair.dtype:
        raise InputError("evoformer_block", f"msa {msa.dtype}, pair {pair.dtype}", "one type")
