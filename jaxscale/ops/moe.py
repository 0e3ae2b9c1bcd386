"""Mixture-of-experts feed-forward on one device: dropless by sorting, and its slow twin."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxscale.kernels.grouped_matmul import api as kernel
from jaxscale.ops import tiles
from jaxscale.ops.activation import activate
from jaxscale.ops.device import kernel_for
from jaxscale.ops.dispatch import make_dispatch
from jaxscale.ops.draws import Dropout
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, Params

logger = logging.getLogger(__name__)


def experts(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None = None,
    dropout: Dropout | None = None,
    *,
    tile: int | None = None,
) -> Array:
    """Sends each token to its experts and returns the gated sum of their outputs.

    No token is ever dropped.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), equation 1; dropless by sorting as in arXiv
        2211.15841.
    Args:
        x: [B, T, D].
        index: [B, T, A] the chosen experts of each token, A experts a token.
        gates: [B, T, A] their weights.
        weights: expert matrices with leading dim E: `up` [E, D, F], `down` [E, F, D], and `gate`
            when gated.
        activation: name of the feed-forward's activation.
        slopes: [B, T, A] what the gradient of an expert's output is multiplied by in place of its
            gate, not differentiated; None for the gates.
        dropout: of the hidden activations, with a key [B, T, A, 2] a choice; None drops nothing.
        tile: rows of an expert that are multiplied at a time, so that a row's result depends on
            it alone; None leaves that to the backend.
    Returns:
        [B, T, D] in the type of `x`.
    Cost: 6 D F FLOPs a row (gated), B T A rows.
    """
    tokens = x.reshape(-1, x.shape[-1])
    choices = index.reshape(-1, index.shape[-1])
    dispatch = make_dispatch(choices, weights["up"].shape[0])
    if dropout is not None:
        dropout = dataclasses.replace(dropout, keys=dispatch.keys(dropout.keys))
    rows = dispatch.rows(tokens)
    outputs = grouped_ffn(rows, dispatch.group_sizes, weights, activation, dropout, tile=tile)
    if slopes is not None:
        slopes = slopes.reshape(choices.shape)
    y = dispatch.combine(outputs, gates.reshape(choices.shape), slopes)
    return y.reshape(x.shape)


def grouped_ffn(
    rows: Array,
    group_sizes: Array,
    weights: Params,
    activation: str,
    dropout: Dropout | None = None,
    *,
    tile: int | None = None,
    needs_tail: bool = True,
) -> Array:
    """The feed-forward of expert e on its consecutive `group_sizes[e]` rows.

    Rows past the last group give zero.

    Args:
        rows: [rows, D] sorted by expert.
        group_sizes: [E] int32.
        weights, activation: as in `experts`.
        dropout: with a key [rows, 2] a row.
        tile: as in `experts`.
        needs_tail: False where nobody reads the rows past the last group, nor their gradient:
            see `kernels.grouped_matmul.api.feed_forward`.
    Returns:
        [rows, D].
    """
    if tile is not None:
        multiply = functools.partial(tiles.grouped_matmul, group_sizes=group_sizes, num_rows=tile)
        return _feed_forward(multiply, rows, weights, activation, dropout)
    families = {kernel_for(kernel, rows, weights[name]) for name in ("up", "down")}
    family = families.pop() if len(families) == 1 else None
    implementation = family or "xla"
    logger.info("experts: backend %s for rows%s %s", implementation, rows.shape, rows.dtype)
    if family and activation == "swiglu" and dropout is None:
        matrices = (weights[name] for name in ("gate", "up", "down"))
        return kernel.feed_forward(
            rows, *matrices, group_sizes, implementation=family, needs_tail=needs_tail
        )
    multiply = functools.partial(
        kernel.grouped_matmul,
        group_sizes=group_sizes,
        implementation=implementation,
    )
    return _feed_forward(multiply, rows, weights, activation, dropout)


def _feed_forward(
    multiply: Callable,
    rows: Array,
    weights: Params,
    activation: str,
    dropout: Dropout | None,
) -> Array:
    """The feed-forward by `multiply(rows, matrices)`; arguments as `grouped_ffn`."""
    gate = multiply(rows, weights["gate"]) if "gate" in weights else None
    up = multiply(rows, weights["up"])
    hidden = activate(activation, gate, up)
    if dropout is not None:
        hidden = dropout(hidden)
    return multiply(hidden, weights["down"])


def reference(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None = None,
    dropout: Dropout | None = None,
) -> Array:
    """The slow twin: every expert on every token, in at least float32; arguments as `experts`."""
    x_wide = accumulator(x)
    num_experts = weights["up"].shape[0]
    chosen = jax.nn.one_hot(index, num_experts, dtype=x_wide.dtype)

    def output_of(expert: Params, chosen: Array) -> Array:
        def project(name: str) -> Array:
            return jnp.einsum("btd,df->btf", x_wide, accumulator(expert[name]))

        projected = {name: project(name) for name in expert if name != "down"}
        hidden = activate(activation, projected.get("gate"), projected["up"])
        if dropout is not None:
            ones = jnp.ones((*index.shape, hidden.shape[-1]), x_wide.dtype)
            hidden = hidden * jnp.einsum("bta,btaf->btf", chosen, dropout(ones))
        return jnp.einsum("btf,fd->btd", hidden, accumulator(expert["down"]))

    def mixed(outputs: Array, gates: Array) -> Array:
        return jnp.einsum("btae,bta,ebtd->btd", chosen, accumulator(gates), outputs)

    outputs = jax.vmap(output_of, (0, -1))(weights, chosen)
    if slopes is None:
        return mixed(outputs, gates).astype(x.dtype)
    # The value is that of the gates; outputs get their gradient through the slopes, gates theirs
    # through the fixed outputs.
    fixed, slopes = jax.lax.stop_gradient((outputs, slopes))
    by_slopes = mixed(outputs, slopes)
    y = by_slopes + mixed(fixed, gates) - jax.lax.stop_gradient(by_slopes)
    return y.astype(x.dtype)
