"""A layer of a few tokens with matrices in few bits, as four products that do what is around them.

A step of decoding waits for one small kernel after the other. Here the norms, the gate and the sums
with the residual are in the launches of the products; attention stays as it is.
"""

import dataclasses
import logging
from typing import Any

import jax

from jaxscale.models.config import FeedForwardConfig
from jaxscale.models.layers import Layer, norm_scale
from jaxscale.models.moe import Choices
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.collectives import Collectives
from jaxscale.ops.draws import Draws
from jaxscale.ops.linear import has_kernel, products_of_rows
from jaxscale.ops.quantised import GROUP, QuantisedMatrix
from jaxscale.types import Array

logger = logging.getLogger(__name__)

MATRICES = {"attention": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down")}
LAST = ("attention", "o"), ("ffn", "down")  # whose inputs are not the residual's


@dataclasses.dataclass(frozen=True)
class FewTokens(Layer):
    """A layer that `fits`; its slow twin is `Layer`.

    Args:
        implementation: of the products, a backend of `kernels.quantised_matmul`.
    """

    implementation: str = "mosaic"

    def __call__(
        self,
        x: Array,
        context: AttentionContext,
        cache: Any = None,
        draws: Draws | None = None,
    ) -> tuple[Array, Any, Choices | None]:
        """As `Layer`; nothing is drawn."""
        attention, ffn = self.params["attention"], self.params["ffn"]
        rows = x.reshape(-1, x.shape[-1])
        matrices = [attention[name] for name in "qkv"]
        heads = self._products(rows, matrices, norm=attention["norm"])
        q, k, v = (
            y.reshape(*x.shape[:2], *each.shape[1:])
            for y, each in zip(heads, matrices, strict=True)
        )
        q, k, v = self.positioned(q, k, v, context.positions, context.lengths)
        o, cache = self.attend(q, k, v, context, cache)
        o = o.reshape(len(rows), -1)
        (rows,) = self._products(o, [attention["o"]], residual=rows)
        matrices = [ffn["gate"], ffn["up"]]
        (hidden,) = self._products(rows, matrices, norm=ffn["norm"], is_gated=True)
        (rows,) = self._products(hidden, [ffn["down"]], residual=rows)
        return rows.reshape(x.shape), cache, None

    def _products(
        self,
        x: Array,
        matrices: list[QuantisedMatrix],
        norm: Any = None,
        **around: Any,
    ) -> list[Array]:
        if norm is not None:
            norm = norm_scale(norm, self.norm), self.norm.epsilon
        return products_of_rows(
            x, matrices, norm=norm, implementation=self.implementation, **around
        )


def fused(layer: Layer, x: Array) -> Layer:
    """The layer as `FewTokens` where that computes it, else as it is.

    Args:
        layer: a layer.
        x: its input [B, T, D].
    """
    if not fits(layer):
        return layer
    depth = max(x.shape[-1], *(layer.params[part][name].depth for part, name in LAST))
    rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], depth), x.dtype)
    if not has_kernel(rows, is_alone=False):
        return layer
    logger.info("layer: products of few tokens with what is around them for x%s", x.shape)
    return FewTokens(layer.params, layer.config, layer.norm, layer.operations)


def fits(layer: Layer) -> bool:
    """Whether a layer is norm, attention, norm and SwiGLU, with whole units in few bits."""
    config, feed_forward = layer.config, layer.config.feed_forward
    if not isinstance(feed_forward, FeedForwardConfig):
        return False
    is_plain = (
        layer.norm.kind == "rmsnorm"
        and config.has_norm_before
        and not (config.has_norm_after or config.has_norm_of_sum or config.is_parallel)
        and config.attention.qk_norm != "all"
        and "o" not in config.attention.biases
        and feed_forward.activation == "swiglu"
        and not feed_forward.use_bias
        and layer.operations.collectives == Collectives()
    )
    return is_plain and all(
        isinstance(matrix := layer.params[part].get(name), QuantisedMatrix)
        and matrix.depth % GROUP == 0
        for part, names in MATRICES.items()
        for name in names
    )
