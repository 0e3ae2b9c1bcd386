"""One layer of a decoder as three functions: `qkv`, `attend` and `finish`.

Batch and time may be a batch of rows, a chunk of a sequence or one flat ragged row: only `attend`
mixes tokens, the other two treat each token by itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models import moe
from jaxscale.models.config import LayerConfig, NormConfig
from jaxscale.ops.activation import activate
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.backends import Operations
from jaxscale.ops.by_row import ByRow
from jaxscale.ops.draws import Draws
from jaxscale.ops.linear import (
    Weights,
    linear,
    linear_each,
    linear_heads,
    linear_joined,
    map_outputs,
)
from jaxscale.ops.norm import layer_norm, residual_norm, rms_norm
from jaxscale.ops.precision import accumulator
from jaxscale.ops.rotary import rotate
from jaxscale.types import Array, InputError, Params


def normalise(
    params: Params,
    x: Array,
    config: NormConfig,
) -> Array:
    """The configured norm over the last dim of `x`."""
    scale = norm_scale(params, config)
    if config.kind == "rmsnorm":
        return rms_norm(x, scale, epsilon=config.epsilon)
    return layer_norm(x, scale, params.get("bias"), epsilon=config.epsilon)


def norm_scale(params: Params, config: NormConfig) -> Array | ByRow:
    """The scale of a norm; with an offset in at least float32, in which a small one counts."""
    if not config.scale_offset:
        return params["scale"]
    return jax.tree.map(lambda s: accumulator(s) + config.scale_offset, params["scale"])


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer with its parameters.

    Args:
        params: as `Collectives.gather_parameters` gave them, in the compute type.
        config: its kind.
        norm: the model's norm.
        operations: what the mesh injects; `backends.name` knows the layer's place in the model.
    """

    params: Params
    config: LayerConfig
    norm: NormConfig
    operations: Operations

    def __call__(
        self,
        x: Array,
        context: AttentionContext,
        cache: Any = None,
        draws: Draws | None = None,
    ) -> tuple[Array, Any, moe.Choices | None]:
        """The whole layer.

        Args:
            x: residual [B, own T, D].
            context: mask structure of the tokens [B, T].
            cache: of this layer, owned by the attention backend; None without one.
            draws: of these tokens in training; None in evaluation and serving.
        Returns:
            (residual [B, own T, D], cache, what its router chose or None in a dense layer).
        """

        def project_and_attend(h: Array, context: AttentionContext) -> tuple[Array, Any]:
            q, k, v = self.qkv(h, context.positions, context.lengths)
            return self.attend(q, k, v, context, cache)

        x, h = self.enter_attention(x)
        y, cache = self._exchange(project_and_attend, self.output, h, context)
        x, choices = self.finish(x, h, y, draws)
        return x, cache, choices

    def _exchange(
        self,
        column: Callable,
        row: Callable,
        x: Array,
        *by_token: Any,
    ) -> tuple[Array, Any]:
        """`Collectives.column_then_row`; all rows at once where heads are summed over."""
        collectives = self.operations.collectives
        if self.config.attention.qk_norm != "all":
            return collectives.column_then_row(column, row, x, *by_token)
        # `column_then_row` may have each device at other rows at a time. A sum over the heads of
        # all devices would then add up different tokens.
        hidden, kept = column(collectives.gather_tokens(x), *by_token)
        return collectives.reduce_scatter_tokens(row(hidden)), kept

    def enter_attention(self, x: Array) -> tuple[Array, Array]:
        """(the residual [B, own T, D], what attention takes of it)."""
        x = self._name("residual", x)
        if not self.config.has_norm_before:
            return x, x
        return self._residual_and_norm("attention", x)

    def qkv(
        self,
        h: Array,
        positions: Array,
        lengths: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Projections, norm of queries and keys, rotary positions.

        Args:
            h: what `enter_attention` returned, of all tokens, [B, T, D].
            positions: [B, T].
            lengths: as in `AttentionContext`.
        Returns:
            q [B, T, N, H], k [B, T, K, H], v [B, T, K, H]; on a mesh the local heads.
        """
        params = self.params["attention"]
        if "qkv" in params:
            q, k, v = linear_joined(h, params["qkv"])
        else:
            weights = [params["q"], self._kv_heads(params["k"], 1), self._kv_heads(params["v"], 1)]
            q, k, v = linear_heads(h, weights)
        return self.positioned(q, k, v, positions, lengths)

    def positioned(
        self,
        q: Array,
        k: Array,
        v: Array,
        positions: Array,
        lengths: Array | None,
    ) -> tuple[Array, Array, Array]:
        """The projections with biases, norm of queries and keys, and rotary positions.

        Args:
            q: [B, T, N, H]; on a mesh the local heads.
            k: [B, T, K, H], likewise.
            v: [B, T, K, H], likewise.
            positions: [B, T].
            lengths: as in `AttentionContext`.
        Returns:
            q, k and v in their shapes.
        """
        params, config, kv_heads = self.params["attention"], self.config.attention, self._kv_heads
        if "q" in config.biases:
            q = q + params["q_bias"]
        if "k" in config.biases:
            k = k + kv_heads(params["k_bias"], 0)
        if "v" in config.biases:
            v = v + kv_heads(params["v_bias"], 0)
        if config.qk_norm == "head":
            q = normalise(params["q_norm"], q, self.norm)
            k = normalise(params["k_norm"], k, self.norm)
        elif config.qk_norm == "all":
            scales = {name: kv_heads(p, 0) for name, p in params["k_norm"].items()}
            q = self._normalise_all_heads(params["q_norm"], q)
            k = self._normalise_all_heads(scales, k)
        if config.rotary is not None:
            q = rotate(q, positions, config.rotary, lengths)
            k = rotate(k, positions, config.rotary, lengths)
        return self._name("q", q), self._name("k", k), self._name("v", v)

    def _kv_heads(self, weights: Weights, axis: int) -> Weights:
        """What this device has of weights of the keys' or values' heads."""
        num = self.config.attention.num_kv_heads
        local_heads = self.operations.collectives.kv_heads
        return map_outputs(lambda w: local_heads(w, axis, num), weights)

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: AttentionContext,
        cache: Any,
    ) -> tuple[Array, Any]:
        """The only step in which tokens meet.

        Args:
            q: [B, T, N, H], as of `qkv`.
            k: [B, T, K, H].
            v: [B, T, K, H].
            context: mask structure of the tokens [B, T].
            cache: of this layer, owned by the attention backend; None without one.
        Returns:
            (output [B, T, N, H], cache).
        """
        self._check_layout(q.shape[2])
        context = self.masked(context)
        o, cache = self.operations.backends.attention(q, k, v, context, cache)
        return self._name("attention", o), cache

    def masked(self, context: AttentionContext) -> AttentionContext:
        """The context with this layer's window, soft-cap, scale and layout of blocks."""
        config = self.config.attention
        return dataclasses.replace(
            context,
            window=config.window,
            softcap=config.softcap,
            scale=config.scale,
            layout=config.layout,
        )

    def _check_layout(self, num_local: int) -> None:
        """Raises InputError unless local heads have the layout of blocks of the model's heads.

        A head's blocks depend on its number modulo the stride.
        """
        config = self.config.attention
        if config.layout is None or num_local == config.num_heads:
            return
        stride = config.layout.stride
        if rest := num_local % stride:
            expected = (
                f"num_heads % (tensor * stride) == 0 for a layout of blocks of stride {stride}, "
                f"but of the {num_local} heads of a member {rest} are left over"
            )
            raise InputError("MeshConfig.tensor", config.num_heads // num_local, expected)

    def output(self, o: Array) -> Array:
        """Output projection of [B, T, N, H]; on a mesh partial sums of [B, T, D]."""
        return linear("btnh,nhd->btd", o, self.params["attention"]["o"])

    def finish(
        self,
        x: Array,
        h: Array,
        y: Array,
        draws: Draws | None = None,
    ) -> tuple[Array, moe.Choices | None]:
        """Adds attention's output to the residual, then the feed-forward's.

        Args:
            x: residual [B, own T, D].
            h: the input of attention [B, own T, D], which a parallel feed-forward takes too.
            y: [B, own T, D] what `output` made of these tokens, summed over the tensor group.
            draws: of these tokens in training; None in evaluation and serving.
        Returns:
            (residual [B, own T, D], what the router chose or None in a dense layer).
        """
        attention = self.params["attention"]
        if "o" in self.config.attention.biases:
            y = y + attention["o_bias"]
        y = self._normalise_after(attention, y)
        if self.config.is_parallel:
            y_ffn, choices = self._feed_forward(h, draws)
            return _add(self._name("attended", _add(x, y)), y_ffn), choices
        x = self._name("attended", self._normalise_sum(attention, _add(x, y)))
        if self.config.has_norm_before:
            x, h = self._residual_and_norm("moe" if self.config.is_moe else "ffn", x)
        else:
            h = x
        y, choices = self._feed_forward(h, draws)
        feed_forward = self.params["moe" if self.config.is_moe else "ffn"]
        return self._normalise_sum(feed_forward, _add(x, y)), choices

    def _feed_forward(self, h: Array, draws: Draws | None) -> tuple[Array, moe.Choices | None]:
        """What the feed-forward adds to the residual, [B, own T, D], of its input `h`."""
        config, collectives = self.config.feed_forward, self.operations.collectives
        if self.config.is_moe:
            params = self.params["moe"]
            h = collectives.gather_tokens(h)
            y, choices = moe.experts(params, h, config, self.operations, draws)
            y = self._name("feed_forward", collectives.reduce_scatter_tokens(y))
            return self._normalise_after(params, y), choices
        params = self.params["ffn"]

        def up(h: Array) -> tuple[Array, None]:
            return self._hidden(h), None

        def down(hidden: Array) -> Array:
            return linear("btf,fd->btd", hidden, params["down"])

        y, _ = collectives.column_then_row(up, down, h)
        y = self._name("feed_forward", y)
        if config.use_bias:
            y = y + params["down_bias"]
        return self._normalise_after(params, y), None

    def _hidden(self, h: Array) -> Array:
        """The activated hidden vector [B, T, F] of a dense feed-forward."""
        params, config = self.params["ffn"], self.config.feed_forward
        names = ("gate", "up") if config.is_gated else ("up",)
        if "gate_up" in params:
            outputs = linear_joined(h, params["gate_up"])
        else:
            outputs = linear_each("btd,df->btf", h, [params[name] for name in names])
        if config.use_bias:
            pairs = zip(outputs, names, strict=True)
            outputs = [y + params[f"{name}_bias"] for y, name in pairs]
        gate, up = outputs if config.is_gated else (None, *outputs)
        return activate(config.activation, gate, up)

    def _residual_and_norm(self, branch: str, x: Array) -> tuple[Array, Array]:
        """The residual `x`, to go on with, and the norm of it that a branch takes."""
        params = self.params[branch]["norm"]
        if self.norm.kind == "rmsnorm":
            return residual_norm(x, norm_scale(params, self.norm), epsilon=self.norm.epsilon)
        return x, normalise(params, x, self.norm)

    def _normalise_after(self, params: Params, y: Array) -> Array:
        if not self.config.has_norm_after:
            return y
        return normalise(params["norm_after"], y, self.norm)

    def _normalise_sum(self, params: Params, x: Array) -> Array:
        return normalise(params["norm_after"], x, self.norm) if self.config.has_norm_of_sum else x

    def _normalise_all_heads(self, params: Params, x: Array) -> Array:
        """The norm of x [B, T, N, H] over all heads of a token, those of other devices included."""
        total = self.operations.collectives.sum_over_heads
        x32 = accumulator(x)
        count = total(jnp.asarray(x.shape[2] * x.shape[3], x32.dtype))
        if self.norm.kind == "layernorm":
            x32 = x32 - total(x32.sum((2, 3), keepdims=True)) / count
        mean_square = total((x32 * x32).sum((2, 3), keepdims=True)) / count
        y = (
            x32
            * lax.rsqrt(mean_square + self.norm.epsilon)
            * accumulator(norm_scale(params, self.norm))
        )
        if "bias" in params:
            y = y + accumulator(params["bias"])
        return y.astype(x.dtype)

    def _name(self, name: str, x: Array) -> Array:
        return self.operations.backends.name(name, x)


def _add(x: Array, y: Array) -> Array:
    """x + y as rows of tokens.

    In another shape XLA copies `x` first, when the matmul that makes `y` adds `x` too.
    """
    rows = x.reshape(-1, x.shape[-1])
    return (rows + y.reshape(rows.shape)).reshape(x.shape)
