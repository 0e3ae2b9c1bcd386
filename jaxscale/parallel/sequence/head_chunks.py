"""Layers whose attention takes some of the heads at a time, over the whole sequence.

Source: UPipe (arXiv 2602.21196), chunks of heads over Ulysses' exchange in place of chunks of
    tokens; nothing goes to the host.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.attention import KERNEL_OUTPUT, AttentionContext
from jaxscale.ops.backends import EXCHANGED, ROUTER
from jaxscale.ops.draws import Draws
from jaxscale.ops.linear import ADAPTED
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, Params, check_positive, check_types

# Dims of heads in attention's parameters, counted from the front.
HEADS_DIM = {"q": 1, "k": 1, "v": 1, "o": 0, "q_bias": 0, "k_bias": 0, "v_bias": 0}


@dataclasses.dataclass(frozen=True)
class HeadChunks:
    """Projections, exchange and attention of one group of heads at a time.

    The backward makes a group's queries, keys and values again and keeps its output, so that
    attention runs once. The feed-forward runs on all tokens at once.

    Source: as the module.
    Args:
        num_chunks: groups of heads, dividing the kv heads.
    """

    num_chunks: int

    def __post_init__(self):
        check_types(self)
        check_positive("HeadChunks.num_chunks", self.num_chunks)

    def __call__(
        self,
        layer: Any,
        x: Array,
        context: AttentionContext,
        cache: Any,
        draws: Draws | None,
    ) -> tuple[Array, Any, Any]:
        """As `models.execution.LayerStrategy`.

        Raises:
            InputError: there is a cache, or heads that the chunks do not divide, that know their
                number or that have adapters.
        """
        if cache is not None:
            raise InputError("ExecutionConfig.strategy", self, "Whole() where there is a cache")
        self._check(layer.config.attention, layer.params["attention"])
        collectives = layer.operations.collectives
        x, h = layer.enter_attention(x)
        h = collectives.gather_tokens(h)
        policy = jax.checkpoint_policies.save_only_these_names(KERNEL_OUTPUT, EXCHANGED, ROUTER)

        def of_heads(params: Params, h: Array) -> Array:
            attention = layer.params["attention"] | params
            part = dataclasses.replace(layer, params=layer.params | {"attention": attention})
            q, k, v = part.qkv(h, context.positions, context.lengths)
            o, _ = part.attend(q, k, v, context, None)
            return part.output(o)

        of_heads = jax.checkpoint(of_heads, policy=policy, prevent_cse=False)

        def add(total: Array, params: Params) -> tuple[Array, None]:
            return total + accumulator(of_heads(params, h)), None

        total = jnp.zeros_like(accumulator(h))
        total, _ = lax.scan(add, total, self._groups(layer.params["attention"]))
        y = collectives.reduce_scatter_tokens(total.astype(h.dtype))
        x, choices = layer.finish(x, h, y, draws)
        return x, None, choices

    def _check(self, attention: Any, params: Params) -> None:
        if rest := attention.num_kv_heads % self.num_chunks:
            equation = f"{attention.num_kv_heads} % {self.num_chunks} = {rest}"
            expected = f"num_kv_heads % num_chunks == 0, but {equation}"
            raise InputError("HeadChunks.num_chunks", self.num_chunks, expected)
        if attention.qk_norm == "all" or attention.layout is not None:
            expected = "Whole() for a norm over all heads or a layout of blocks by a head's number"
            raise InputError("ExecutionConfig.strategy", self, expected)
        if any(isinstance(params[name], ADAPTED) for name in HEADS_DIM if name in params):
            expected = "Whole() or FullyPipelined() with adapters, which all groups would share"
            raise InputError("ExecutionConfig.strategy", self, expected)

    def _groups(self, params: Params) -> Params:
        """Each group's parameters: leaves of the heads with a leading dim of groups."""

        def split(x: Array, dim: int) -> Array:
            shape = (*x.shape[:dim], self.num_chunks, -1, *x.shape[dim + 1 :])
            return jnp.moveaxis(x.reshape(shape), dim, 0)

        return {name: split(params[name], dim) for name, dim in HEADS_DIM.items() if name in params}
