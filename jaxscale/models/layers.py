"""One decoder layer as four functions, token-wise but for the second one: `qkv`, `attend`, `output`, `finish`.

Batch and time may be a batch of rows, a chunk of a sequence or one flat ragged row; only `attend`
mixes tokens.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxscale.models import moe
from jaxscale.models.config import LayerKind, ModelConfig
from jaxscale.ops.activation import activate
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.draws import Draws
from jaxscale.ops.norm import layer_norm, residual_norm, rms_norm
from jaxscale.ops.operations import Operations
from jaxscale.ops.rope import rope
from jaxscale.types import Array, Params


def normalise(params: Params, x: Array, config: ModelConfig) -> Array:
    """The configured norm over the last dim of `x`."""
    if config.norm == "rmsnorm":
        return rms_norm(x, params["scale"], epsilon=config.norm_epsilon)
    return layer_norm(x, params["scale"], params.get("bias"), epsilon=config.norm_epsilon)


def branch(params: Params, x: Array, config: ModelConfig) -> tuple[Array, Array]:
    """The residual `x`, to go on with, and its configured norm, which a branch of the layer takes."""
    if config.norm == "rmsnorm":
        return residual_norm(x, params["scale"], epsilon=config.norm_epsilon)
    return x, normalise(params, x, config)


def qkv(
    params: Params, h: Array, positions: Array, config: ModelConfig
) -> tuple[Array, Array, Array]:
    """Projections, QK-norm and rotary positions.

    Args:
        params: one layer, as `operations.gather` gave it.
        h: residual, normalised, [B, T, D].
        positions: [B, T].
    Returns:
        q [B, T, N, H], k [B, T, K, H], v [B, T, K, H]; on a mesh the local heads.
    """
    attention = params["attention"]
    weights = [attention[name] for name in "qkv"]
    # One matmul, and in the backward one to `h` and one to the weights, where three would add up
    # three parts.
    heads = jnp.einsum("btd,dnh->btnh", h, jnp.concatenate(weights, 1))
    q, k, v = lax.split(heads, [w.shape[1] for w in weights], axis=2)
    if config.use_bias:
        q, k, v = (y + attention[f"{name}_bias"] for y, name in zip((q, k, v), "qkv", strict=True))
    if config.use_qk_norm:
        q, k = normalise(attention["q_norm"], q, config), normalise(attention["k_norm"], k, config)
    if config.positions == "rope":
        q, k = (rope(y, positions, theta=config.rope_theta) for y in (q, k))
    return q, k, v


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: Any,
    kind: LayerKind,
    operations: Operations,
) -> tuple[Array, Any]:
    """The only step in which tokens meet; the attention callable owns `cache`."""
    return operations.attention(q, k, v, dataclasses.replace(context, window=kind.window), cache)


def output(params: Params, o: Array) -> Array:
    """Output projection of the attended values [B, T, N, H]; on a mesh partial sums of [B, T, D]."""
    return jnp.einsum("btnh,nhd->btd", o, params["attention"]["o"])


def finish(
    params: Params,
    x: Array,
    y: Array,
    weights: Array,
    config: ModelConfig,
    operations: Operations,
    draws: Draws | None = None,
) -> tuple[Array, moe.RouterSums]:
    """Residual, feed-forward, residual.

    Args:
        params: one layer.
        x: residual [B, own T, D].
        y: [B, own T, D] what attention adds to it, without its bias.
        weights: [B, T], 0 for padding, which the router's figures leave out.
        draws: of these tokens in training; None in evaluation and serving.
    Returns:
        (residual [B, own T, D], the router's sums; zeros in a dense layer).
    """
    attention = params["attention"]
    x = operations.mark("attended", _add(x, y + attention["o_bias"] if config.use_bias else y))
    ffn = params.get("moe") or params["ffn"]
    x, h = branch(ffn["norm"], x, config)
    if "moe" in params:
        y, sums = moe.feed_forward(ffn, operations.enter(h), weights, config, operations, draws)
        return _add(x, operations.mark("feed_forward", operations.exit(y))), sums
    y, _ = operations.between(
        lambda h: (_hidden(ffn, h, config), None),
        lambda hidden: jnp.einsum("btf,fd->btd", hidden, ffn["down"]),
        h,
    )
    y = operations.mark("feed_forward", y)
    return _add(x, y + ffn["down_bias"] if config.use_bias else y), moe.no_router(config)


def _add(x: Array, y: Array) -> Array:
    """x + y as rows of tokens: in another shape XLA's matmul that makes `y`, adding `x` too, copies `x` beforehand."""
    return (x.reshape(-1, x.shape[-1]) + y.reshape(-1, y.shape[-1])).reshape(x.shape)


def _hidden(params: Params, h: Array, config: ModelConfig) -> Array:
    def project(name: str) -> Array:
        y = jnp.einsum("btd,df->btf", h, params[name])
        return y + params[f"{name}_bias"] if config.use_bias else y

    return activate(config.activation, project("gate") if config.is_gated else None, project("up"))
