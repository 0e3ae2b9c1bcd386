"""How layers are executed: looped or unrolled, whole or by parts, and what is recomputed.

No setting changes what is computed, but for the order of sums.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxscale.models.by_row import layer_has_kernels, prepared
from jaxscale.models.layers import Layer
from jaxscale.models.moe import Choices
from jaxscale.ops import moe
from jaxscale.ops.attention import BACKENDS, KERNEL_OUTPUT, AttentionContext, attention
from jaxscale.ops.attention.intervals import attention_over_intervals
from jaxscale.ops.backends import EXCHANGED, ROUTER, Backends, Operations
from jaxscale.ops.by_row import PRODUCT
from jaxscale.ops.draws import Draws
from jaxscale.ops.tiles import over_tiles
from jaxscale.types import Array, InputError, check_choice, check_positive, check_types

GROUP_INPUT = "group_input"
NAMES = ("residual", "q", "k", "v", "attention", "attended", "feed_forward")
CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"  # the name of JAX's primitive


class LayerStrategy(Protocol):
    """How the tokens of one layer are run.

    A strategy that keeps by itself what its backward needs says by `kept_names` how that is named.
    """

    def __call__(
        self,
        layer: Layer,
        x: Array,
        context: AttentionContext,
        cache: Any,
        draws: Draws | None,
    ) -> tuple[Array, Any, Choices | None]:
        """What `layer(x, context, cache, draws)` returns."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """All tokens at once."""

    def __call__(
        self,
        layer: Layer,
        x: Array,
        context: AttentionContext,
        cache: Any,
        draws: Draws | None,
    ) -> tuple[Array, Any, Choices | None]:
        """As `LayerStrategy`."""
        return layer(x, context, cache, draws)


@dataclasses.dataclass(frozen=True)
class ByChunk:
    """All but attention over a chunk of the tokens at a time, recomputed in the backward.

    The layer's weights are gathered once for all chunks. Then activations of a chunk only exist at
    a time, beside queries, keys, values and attention's output of all tokens.

    Source: Yao et al. 2024, FPDT (arXiv 2408.16978), section 5.4, its chunked feed-forward.
    Args:
        num_chunks: chunks of T.
    """

    num_chunks: int

    def __post_init__(self):
        check_types(self)
        check_positive("ByChunk.num_chunks", self.num_chunks)

    def __call__(
        self,
        layer: Layer,
        x: Array,
        context: AttentionContext,
        cache: Any,
        draws: Draws | None,
    ) -> tuple[Array, Any, Choices | None]:
        """As `LayerStrategy`; for one device in a tensor group, so that own tokens are all."""
        return _by_parts(self._over_chunks, layer, x, context, cache, draws)

    def _over_chunks(self, f: Callable, arrays: Any) -> Any:
        """f of each chunk of arrays [B, T, ...], joined again."""
        num = self.num_chunks

        def split(x: Array) -> Array:
            if x.shape[1] % num:
                expected = f"T % num_chunks == 0, but {x.shape[1]} % {num} = {x.shape[1] % num}"
                raise InputError("ByChunk.num_chunks", num, expected)
            return jnp.moveaxis(x.reshape(x.shape[0], num, -1, *x.shape[2:]), 1, 0)

        def join(x: Array) -> Array:
            return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

        policy = jax.checkpoint_policies.save_only_these_names(ROUTER)
        once = jax.checkpoint(f, policy=policy, prevent_cse=False)
        return jax.tree.map(join, lax.map(once, jax.tree.map(split, arrays)))


@dataclasses.dataclass(frozen=True)
class BatchInvariant:
    """Sums in one order, so that a token's bits depend on its own sequence alone.

    Tokens are computed in tiles of one size; on a Hopper GPU dense layers by kernels that need no
    tiles, see `models.by_row`.

    Training and serving both honour it, on one device or on data alone: the log-probabilities of a
    sequence have the same bits in any batch, prompts split or not, from a cached prefix or not, and
    in a training step. Weights are neither quantised nor adapted by request.

    Source: He 2025, "Defeating nondeterminism in LLM inference" (Thinking Machines Lab).
    Args:
        num_rows: tokens of a tile; the same in training and in serving.
        expert_rows: of an expert's tile.
    """

    num_rows: int = 256
    expert_rows: int = 64

    def __post_init__(self):
        check_types(self)
        check_positive("BatchInvariant.num_rows", self.num_rows)
        check_positive("BatchInvariant.expert_rows", self.expert_rows)

    def __call__(
        self,
        layer: Layer,
        x: Array,
        context: AttentionContext,
        cache: Any,
        draws: Draws | None,
    ) -> tuple[Array, Any, Choices | None]:
        """As `LayerStrategy`, with attention by the backend "invariant"."""
        if layer_has_kernels(layer.params, layer.config, layer.norm, x.dtype):
            whole = dataclasses.replace(layer, params=prepared(layer.params))
            return whole(x, context, cache, draws)
        backends = layer.operations.backends
        experts = functools.partial(moe.experts, tile=self.expert_rows)
        operations = dataclasses.replace(
            layer.operations, backends=dataclasses.replace(backends, experts=experts)
        )
        # Rounded weights are what is multiplied, also where they have just been converted.
        params = lax.optimization_barrier(layer.params)
        layer = dataclasses.replace(layer, params=params, operations=operations)
        return _by_parts(self.over_tiles, layer, x, context, cache, draws)

    def over_tiles(self, f: Callable, arrays: Any) -> Any:
        """f of each tile of arrays [B, T, ...], recomputed in the backward."""
        policy = jax.checkpoint_policies.save_only_these_names(ROUTER)
        once = jax.checkpoint(f, policy=policy, prevent_cse=False)
        return over_tiles(once, arrays, self.num_rows)


def _by_parts(
    over_parts: Callable,
    layer: Layer,
    x: Array,
    context: AttentionContext,
    cache: Any,
    draws: Draws | None,
) -> tuple[Array, Any, Choices | None]:
    """A layer, all of it but attention by `over_parts(f, arrays)`; the rest as `LayerStrategy`."""

    def project(part: tuple[Array, Array, Array | None]) -> tuple[Array, Array, Array]:
        x, positions, lengths = part
        _, h = layer.enter_attention(x)
        return layer.qkv(h, positions, lengths)

    def finish(part: tuple[Array, Array, Array | None]) -> tuple[Array, Choices | None]:
        x, o, keys = part
        x, h = layer.enter_attention(x)
        drawn = None if keys is None else dataclasses.replace(draws, keys=keys)
        return layer.finish(x, h, layer.output(o), drawn)

    q, k, v = over_parts(project, (x, context.positions, context.lengths))
    o, cache = layer.attend(q, k, v, context, cache)
    keys = None if draws is None else draws.keys
    x, choices = over_parts(finish, (x, o, keys))
    return x, cache, choices


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the layers are executed.

    Args:
        is_scanned: one compiled layer in a loop, or every layer unrolled, which takes longer to
            compile and is faster on a GPU.
        remat: what the backward recomputes: "none"; "full" (keep only each layer's input); "dots"
            (keep the outputs of matmuls with weights, of attention on a GPU and of exchanges
            between devices, those before a matmul aside); "names" (keep `saved_names` on the device
            and `offloaded_names` in host memory).
        checkpoint_every: k. With k > 1 the input of every k-th period of layers is kept alone, and
            the backward runs the k periods again; needs is_scanned.
        checkpoint_place: where inputs kept by k > 1 rest until then, "device" or "host".
        saved_names: of NAMES.
        offloaded_names: of NAMES.
        num_loss_chunks: chunks of T, of which one has its logits in memory at a time.
        attention: a backend of `ops.attention`; None picks one and logs it.
        strategy: `Whole()`, `ByChunk(num_chunks)`, `BatchInvariant()` or
            `parallel.sequence.fpdt.strategy.FullyPipelined(...)`, which keeps by itself what its
            backward needs, so that remat must be "none".
    """

    is_scanned: bool = True
    remat: str = "full"
    checkpoint_every: int = 1
    checkpoint_place: str = "device"
    saved_names: tuple[str, ...] = ()
    offloaded_names: tuple[str, ...] = ()
    num_loss_chunks: int = 8
    attention: str | None = None
    strategy: Callable = Whole()

    def __post_init__(self):
        check_types(self)
        check_choice("ExecutionConfig.remat", self.remat, ("none", "full", "dots", "names"))
        check_choice("ExecutionConfig.attention", self.attention, (None, *BACKENDS))
        check_choice("ExecutionConfig.checkpoint_place", self.checkpoint_place, ("device", "host"))
        check_positive("ExecutionConfig.num_loss_chunks", self.num_loss_chunks)
        check_positive("ExecutionConfig.checkpoint_every", self.checkpoint_every)
        if self.checkpoint_every > 1 and not self.is_scanned:
            expected = "1 with is_scanned False"
            raise InputError("ExecutionConfig.checkpoint_every", self.checkpoint_every, expected)
        if isinstance(self.strategy, type):
            name = self.strategy.__name__
            expected = f"a strategy: @{name}() with brackets builds it"
            raise InputError("ExecutionConfig.strategy", self.strategy, expected)
        if self.is_batch_invariant and self.attention not in (None, "invariant"):
            expected = 'None or "invariant" with the strategy BatchInvariant'
            raise InputError("ExecutionConfig.attention", self.attention, expected)
        for field in ("saved_names", "offloaded_names"):
            for name in getattr(self, field):
                check_choice(f"ExecutionConfig.{field}", name, NAMES)
        if (self.saved_names or self.offloaded_names) and self.remat != "names":
            expected = '"names" when saved_names or offloaded_names are given'
            raise InputError("ExecutionConfig.remat", self.remat, expected)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a token's bits depend on its own sequence alone."""
        return isinstance(self.strategy, BatchInvariant)

    @property
    def attention_backend(self) -> str | None:
        """The backend of attention that is named, or that the strategy needs."""
        return "invariant" if self.is_batch_invariant else self.attention

    def operations(self) -> Operations:
        """What a model calls on one device: plain functions, with the named attention backend."""
        named = functools.partial(attention, implementation=self.attention_backend)
        of_chunks = functools.partial(attention_over_intervals, implementation=self.attention)
        return Operations(backends=Backends(attention=named, chunk_attention=of_chunks))

    def check_periods(self, num: int, *, num_stages: int = 1) -> None:
        """Raises InputError, with the equation, unless groups of periods divide `num` of them.

        Args:
            num: periods that are scanned.
            num_stages: virtual stages of the pipeline, of which each scans so many.
        """
        size = self.checkpoint_every
        if rest := num % size:
            fitting = [k for k in range(1, num + 1) if num % k == 0]
            of = "" if num_stages == 1 else f" of the longest of {num_stages} stages"
            equation = f"{num} % {size} = {rest}"
            expected = f"periods{of} % checkpoint_every == 0, but {equation}: {fitting}"
            raise InputError("ExecutionConfig.checkpoint_every", size, expected)

    def scan(
        self,
        body: Callable,
        x: Array,
        inputs: Any,
    ) -> tuple[Array, Any]:
        """`lax.scan(body, x, inputs)` over periods, of whose inputs every k-th is kept.

        Raises:
            InputError: k does not divide the number of periods.
        """
        size = self.checkpoint_every
        if size == 1:
            return lax.scan(body, x, inputs)
        num = len(jax.tree.leaves(inputs)[0])
        self.check_periods(num)
        is_on_host = self.checkpoint_place == "host"
        here, away = ([], [GROUP_INPUT]) if is_on_host else ([GROUP_INPUT], [])
        policy = _kept_or_offloaded([ROUTER, *here], away)

        def group(x: Array, inputs: Any) -> tuple[Array, Any]:
            return lax.scan(body, checkpoint_name(x, GROUP_INPUT), inputs)

        def split(leaf: Array) -> Array:
            return leaf.reshape(num // size, size, *leaf.shape[1:])

        def join(leaf: Array) -> Array:
            return leaf.reshape(num, *leaf.shape[2:])

        group = jax.checkpoint(group, policy=policy, prevent_cse=False)
        x, outputs = lax.scan(group, x, jax.tree.map(split, inputs))
        return x, jax.tree.map(join, outputs)

    def rematerialise(self, f: Callable) -> Callable:
        """`f` under the configured policy, which keeps a router's logits whatever else it does.

        Recomputed, they may differ in the last bit, for XLA fuses them with other operations then,
        and a token could be sent to another expert.
        """
        policies = jax.checkpoint_policies
        kept = getattr(self.strategy, "kept_names", (ROUTER,))
        if self.remat == "none" and kept == (ROUTER,):
            return f
        policy = policies.save_only_these_names(*kept)
        if self.remat == "dots":
            policy = _is_product
        elif self.remat == "names":
            saved = [ROUTER, *_with_kernel(self.saved_names)]
            policy = _kept_or_offloaded(saved, _with_kernel(self.offloaded_names))
        return jax.checkpoint(f, policy=policy, prevent_cse=not self.is_scanned)


def _kept_or_offloaded(saved: list[str], offloaded: list[str]) -> Callable:
    """Policy: keep names on the device and in host memory."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )


def _with_kernel(names: tuple[str, ...]) -> list[str]:
    """The names, with the lse of attention where its output is kept.

    The backward needs both, and to make the lse again would run attention again.
    """
    return [*names, *(KERNEL_OUTPUT for name in names if name == "attention")]


def _is_product(primitive: jax.extend.core.Primitive, *avals: Any, **params: Any) -> bool:
    """Policy: keep matmuls with weights, attention on a GPU, and what devices exchanged.

    The latter two are as small as the former and cost as much to make again. A partial sum is not
    kept beside the sum over devices, for then nothing reads it.
    """
    if primitive.name == CUDNN_ATTENTION:
        return True
    if params.get("name") in (KERNEL_OUTPUT, EXCHANGED, ROUTER, PRODUCT):
        return True
    is_matmul = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return is_matmul(primitive, *avals, **params)
