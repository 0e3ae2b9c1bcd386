"""The decoder: embed, run the layer stack, unembed; plain functions over the parameter tree, and an nnx surface."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxscale import tree
from jaxscale.models import layers
from jaxscale.models.config import LayerKind, ModelConfig
from jaxscale.models.moe import RouterSums
from jaxscale.models.parameters import init_params
from jaxscale.ops.attention import BACKENDS, KERNEL_OUTPUT, AttentionContext, attention
from jaxscale.ops.draws import EMBEDDING, Draws
from jaxscale.ops.loss import Head, unembed
from jaxscale.ops.operations import EXCHANGED, Operations
from jaxscale.ops.precision import Policy, cast
from jaxscale.types import (
    Array,
    Batch,
    InputError,
    Params,
    check_choice,
    check_positive,
    check_types,
)

NAMES = ("residual", "q", "k", "v", "attention", "attended", "feed_forward")
# Logits made again may differ in the last bit, as they are fused with other things: a draw could
# take another expert.
ROUTER = "router"
CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"  # the name of JAX's primitive
# A router in low precision picks other experts (GRIN keeps it in float32); a scale next to 1 has
# steps of 2^-7 in bfloat16, so an update of it would be lost.
KEEP_PARAMETER_TYPE = {"router", "scale", "omega", "bias"}


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """How the layer stack is executed; no setting changes what it computes.

    Args:
        is_scanned: one compiled layer in a loop, or every layer unrolled (longer to compile, faster
            on a GPU).
        remat: what the backward recomputes: "none"; "full" (keep only each layer's input); "dots"
            (keep the outputs of matmuls with weights, of attention on a GPU and of exchanges
            between devices, those before a matmul aside); "names" (keep `saved_names` on the device
            and `offloaded_names` in host memory).
        saved_names: of NAMES.
        offloaded_names: of NAMES.
        num_loss_chunks: chunks of T in which logits exist.
        attention: a backend of `ops.attention`; None picks one and logs it.
    """

    is_scanned: bool = True
    remat: str = "full"
    saved_names: tuple[str, ...] = ()
    offloaded_names: tuple[str, ...] = ()
    num_loss_chunks: int = 8
    attention: str | None = None

    def __post_init__(self):
        check_types(self)
        check_choice("StackConfig.remat", self.remat, ("none", "full", "dots", "names"))
        check_choice("StackConfig.attention", self.attention, (None, *BACKENDS))
        check_positive("StackConfig.num_loss_chunks", self.num_loss_chunks)
        for field in ("saved_names", "offloaded_names"):
            for name in getattr(self, field):
                check_choice(f"StackConfig.{field}", name, NAMES)
        if (self.saved_names or self.offloaded_names) and self.remat != "names":
            raise InputError(
                "StackConfig.remat",
                self.remat,
                '"names" when saved_names or offloaded_names are given',
            )

    def operations(self) -> Operations:
        """What the model calls on one device: the plain functions, with the named attention backend."""
        return Operations(attention=functools.partial(attention, implementation=self.attention))

    def rematerialise(self, f: Callable) -> Callable:
        """`f` with the configured policy, under which a router's logits are kept whatever else is."""
        policies = jax.checkpoint_policies
        if self.remat == "none":
            return f
        policy = policies.save_only_these_names(ROUTER)
        if self.remat == "dots":
            policy = _is_product
        elif self.remat == "names":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[ROUTER, *_with_kernel(self.saved_names)],
                names_which_can_be_offloaded=_with_kernel(self.offloaded_names),
                offload_src="device",
                offload_dst="pinned_host",
            )
        return jax.checkpoint(f, policy=policy, prevent_cse=not self.is_scanned)


def _with_kernel(names: tuple[str, ...]) -> list[str]:
    """The output of attention alone would not spare its kernel: the backward wants the normaliser too."""
    return [*names, *(KERNEL_OUTPUT for name in names if name == "attention")]


def _is_product(primitive: jax.extend.core.Primitive, *avals: Any, **params: Any) -> bool:
    """Policy: matmuls with weights, and what is as small and as dear: attention on a GPU and what devices exchange.

    A partial sum is not kept beside the sum over devices, for then nothing reads it.
    """
    is_like = primitive.name == CUDNN_ATTENTION or params.get("name") in (
        KERNEL_OUTPUT,
        EXCHANGED,
        ROUTER,
    )
    return is_like or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *avals, **params
    )


def attention_context(batch: Batch, config: ModelConfig) -> AttentionContext:
    """The mask structure of a batch; without `segments` a row is one document."""
    return AttentionContext(
        positions=batch["positions"],
        segments=batch.get("segments"),
        softcap=config.attention_softcap,
    )


def to_compute(params: Params, policy: Policy) -> Params:
    """All parameters but those of routers and norms in the compute type."""

    def one(path: str, leaf: Array) -> Array:
        # Any part of the path: a parameter may itself be a tree of arrays.
        return (
            leaf
            if KEEP_PARAMETER_TYPE & set(path.split(tree.SEPARATOR))
            else cast(leaf, policy.compute)
        )

    return tree.map_with_path(one, params)


def use(params: Params, section: str, operations: Operations, policy: Policy) -> Params:
    """Parameters of a section as the forward uses them: in the compute type, gathered."""
    # In this order: the gather then moves bytes of the compute type.
    return operations.gather(section, to_compute(params, policy))


def embed(
    params: Params, batch: Batch, config: ModelConfig, operations: Operations, policy: Policy
) -> Array:
    """Tokens [B, T] to the residual [B, own T, D].

    Looked up in the parameter type: the gradient of a row adds up all occurrences of its token, and
    a sum in bfloat16 stands still after 256 equal terms. Positions outside a learned table, as of
    padding, read its last row.
    """
    embedding = operations.gather("embedding", params["embedding"])
    x = operations.embed(embedding["tokens"], batch["tokens"])
    if config.positions == "learned":
        x = x + embedding["positions"][operations.own(batch["positions"])]
    return operations.mark("embedding", x.astype(policy.compute))


def add_noise(x: Array, draws: Draws, width: float, operations: Operations) -> Array:
    """The residual [B, own T, D] plus noise of a uniform distribution from -`width` to `width`.

    Source: Jain et al. 2023, NEFTune (arXiv 2310.05914), algorithm 1; its width is alpha / sqrt(T
        D).
    """
    own = dataclasses.replace(draws, keys=operations.own(draws.keys))
    noise = width * (2 * own.numbers(EMBEDDING, x.shape[-1]) - 1)
    return x + noise.astype(x.dtype)


def run_layer(
    params: Params,
    x: Array,
    context: AttentionContext,
    weights: Array,
    cache: Any,
    draws: Draws | None = None,
    *,
    kind: LayerKind,
    section: str,
    config: ModelConfig,
    operations: Operations,
    policy: Policy,
) -> tuple[Array, Any, RouterSums]:
    """One layer: residual [B, own T, D] and cache to the next residual, the layer's cache and its router's sums."""
    params = use(params, section, operations, policy)

    def mark(name: str, y: Array) -> Array:
        return operations.mark(f"{section}/{name}", y)

    def attend(h: Array, context: AttentionContext) -> tuple[Array, Any]:
        q, k, v = layers.qkv(params, h, context.positions, config)
        q, k, v = mark("q", q), mark("k", k), mark("v", v)
        o, new = layers.attend(q, k, v, context, cache, kind, operations)
        return mark("attention", o), new

    x, h = layers.branch(params["attention"]["norm"], mark("residual", x), config)
    y, new = operations.between(attend, functools.partial(layers.output, params), h, context)
    marking = dataclasses.replace(operations, mark=mark)
    x, sums = layers.finish(params, x, y, weights, config, marking, draws)
    return x, new, sums


def run_layers(
    params: Params,
    x: Array,
    context: AttentionContext,
    weights: Array,
    caches: Any = None,
    **settings: Any,
) -> tuple[Array, Any, list[RouterSums]]:
    """Runs the prefix and the whole stack; `settings` as theirs, `caches` {"prefix": ..., "layers": ...} or None."""
    caches = caches or {"prefix": None, "layers": None}
    x, prefix = run_prefix(params, x, context, weights, caches["prefix"], **settings)
    x, layers, sums = run_stack(params["layers"], x, context, weights, caches["layers"], **settings)
    return x, {"prefix": prefix, "layers": layers}, sums


def run_prefix(
    params: Params,
    x: Array,
    context: AttentionContext,
    weights: Array,
    caches: Any = None,
    *,
    config: ModelConfig,
    operations: Operations,
    policy: Policy,
    stack: StackConfig,
) -> tuple[Array, Any]:
    """Runs the layers before the stack.

    Args:
        params: the whole tree; only `prefix` is read.
        x: residual [B, own T, D].
        context: mask structure of these tokens.
        weights: [B, T] 0 for padding.
        caches: {i: cache} or None; opaque, see `Operations.attention`.
    Returns:
        (residual, caches).
    """
    caches, new = caches or {}, {}
    for i, kind in enumerate(config.prefix):
        one = functools.partial(
            run_layer,
            kind=kind,
            section=f"prefix/{i}",
            config=config,
            operations=operations,
            policy=policy,
        )
        layer = stack.rematerialise(one)
        x, new[str(i)], _ = layer(params["prefix"][str(i)], x, context, weights, caches.get(str(i)))
    return x, new


class Periods(NamedTuple):
    """Periods of the stack.

    Args:
        number: [periods] of each, counted from the model's first.
        is_real: [periods] bool, false for one to skip; None skips none.
    """

    number: Array
    is_real: Array | None = None


def run_stack(
    params: Params,
    x: Array,
    context: AttentionContext,
    weights: Array,
    caches: Any = None,
    periods: Periods | None = None,
    draws: Draws | None = None,
    *,
    config: ModelConfig,
    operations: Operations,
    policy: Policy,
    stack: StackConfig,
) -> tuple[Array, Any, list[RouterSums]]:
    """Runs periods of the repeating pattern: all of them, or those that one pipeline stage holds.

    Args:
        params: the tree `layers`, leaves [periods, ...]; or, for an unrolled stack, a tuple of the
            periods' trees.
        x: residual [B, own T, D].
        context: mask structure of these tokens.
        weights: [B, T] 0 for padding.
        caches: {position in the pattern: stacked caches} or None.
        periods: which of the model's periods these are; None for all of them in order.
        draws: of these tokens in training; None in evaluation and serving.
    Returns:
        (residual, caches, RouterSums of [periods] per position of the pattern).
    """

    def period(
        x: Array, stacks: tuple[Params, Any, Periods]
    ) -> tuple[Array, tuple[Any, list[RouterSums]]]:
        layer_params, layer_caches, here = stacks
        if here.is_real is None:
            return run(x, layer_params, layer_caches, here.number)
        shapes = jax.eval_shape(run, x, layer_params, layer_caches, here.number)[1]
        skipped = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return lax.cond(
            here.is_real,
            lambda x: run(x, layer_params, layer_caches, here.number),
            lambda x: (x, skipped),
            x,
        )

    def run(
        x: Array, layer_params: Params, layer_caches: Any, number: Array
    ) -> tuple[Array, tuple[Any, list]]:
        first, kept, sums = config.num_dense_prefix + number * config.period, {}, []
        for i, kind in enumerate(config.pattern):
            one = functools.partial(
                run_layer,
                kind=kind,
                section=f"layers/{i}",
                config=config,
                operations=operations,
                policy=policy,
            )
            layer, own = stack.rematerialise(one), None if draws is None else draws.at(first + i)
            x, kept[str(i)], s = layer(
                layer_params[str(i)], x, context, weights, layer_caches.get(str(i)), own
            )
            sums.append(s)
        return x, (kept, sums)

    if stack.is_scanned:
        loop = lax.scan
    else:
        # Converted at once, for then the gradient is stacked in the compute type, at half the
        # bytes.
        loop, params = _unrolled, to_compute(params, policy)
    if periods is None:
        periods = Periods(
            jnp.arange(
                len(params) if isinstance(params, tuple) else len(jax.tree.leaves(params)[0])
            )
        )
    x, (new, sums) = loop(period, x, (params, caches or {}, periods))
    return x, new, sums


def _unrolled(body: Callable, carry: Any, stacks: Any) -> tuple[Any, Any]:
    """`lax.scan(body, carry, stacks)` with every iteration written out; the first stack may be a tuple of its parts."""
    params, *others = stacks
    outputs = []
    for own, other in zip(
        params if isinstance(params, tuple) else _unstack(params), _unstack(others), strict=True
    ):
        carry, output = body(carry, (own, *other))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


@jax.custom_vjp
def _unstack(tree: Any) -> list[Any]:
    """Splits the leading dim of every leaf; its gradient is one stack, where slicing's would be L padded sums."""
    num_periods = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(num_periods)]  # noqa: B023


def _stack(*leaves: Array) -> Array:
    """`jnp.stack(leaves)`, each copied as soon as the backward has made it, last layer first.

    XLA would fuse `jnp.stack` with what reads it, the norm and the update, and such kernels run at
    a third and two thirds of an H200's memory rate; the copies run beside the backward's matmuls.
    Vectors are not worth a copy each.
    """
    if leaves[0].ndim == 1:
        return jnp.stack(leaves)
    stack = lax.empty((len(leaves), *leaves[0].shape), leaves[0].dtype)
    for i in reversed(range(len(leaves))):
        stack = lax.dynamic_update_index_in_dim(stack, leaves[i], i, 0)
    return lax.optimization_barrier(stack)


_unstack.defvjp(
    lambda tree: (_unstack(tree), None), lambda _, cotangents: (jax.tree.map(_stack, *cotangents),)
)


def unembedding(
    params: Params, config: ModelConfig, operations: Operations, policy: Policy
) -> Array | Head:
    """The unembedding matrix [V, D], with its bias where it has one (on a mesh: the local rows)."""
    head = use(params["head"], "head", operations, policy) if "head" in params else {}
    if config.is_tied:
        head["weights"] = use(params["embedding"], "embedding", operations, policy)["tokens"]
    return Head(**head) if config.use_head_bias else head["weights"]


def final_hidden(
    params: Params, x: Array, config: ModelConfig, operations: Operations, policy: Policy
) -> Array:
    """Final norm: residual [B, own T, D] to the unembedding's input [B, T, D]."""
    norm = use(params["final_norm"], "final_norm", operations, policy)
    return operations.mark("final_norm", operations.enter(layers.normalise(norm, x, config)))


def forward(
    params: Params,
    batch: Batch,
    caches: Any = None,
    *,
    config: ModelConfig,
    operations: Operations | None = None,
    policy: Policy | None = None,
    stack: StackConfig | None = None,
) -> tuple[Array, Any]:
    """Logits of every token.

    Args:
        params: the parameter tree.
        batch: tokens and positions [B, T] int32; optionally segments and weights.
        caches: as `run_layers`.
    Returns:
        (logits [B, T, V] in `policy.output`, caches).
    """
    policy, stack = policy or Policy(), stack or StackConfig()
    operations = operations or stack.operations()
    context = attention_context(batch, config)
    weights = batch.get("weights", jnp.ones(batch["tokens"].shape, jnp.float32))
    x = embed(params, batch, config, operations, policy)
    x, caches, _ = run_layers(
        params,
        x,
        context,
        weights,
        caches,
        config=config,
        operations=operations,
        policy=policy,
        stack=stack,
    )
    h = final_hidden(params, x, config, operations, policy)
    logits = unembed(h, unembedding(params, config, operations, policy), config.logit_softcap)
    return logits.astype(policy.output), caches


class Transformer(nnx.Module):
    """The decoder as an nnx module: holds the configuration and the parameters; `forward` does the work.

    Args:
        config: the model.
        rngs: its `params` stream seeds the parameters.
        policy: dtype policy.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, policy: Policy | None = None):
        self.config = config
        self.policy = policy or Policy()
        params = init_params(config, rngs.params(), self.policy.parameters)
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(
        self, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        """Logits [B, T, V] of tokens [B, T]; positions default to 0 .. T - 1."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        batch = {"tokens": tokens, "positions": positions}
        batch |= {} if segments is None else {"segments": segments}
        return forward(self.pure_params(), batch, config=self.config, policy=self.policy)[0]

    def pure_params(self) -> Params:
        """The parameter tree as plain arrays, as the train step takes it."""
        return jax.tree.map(
            lambda p: p[...], self.params, is_leaf=lambda p: isinstance(p, nnx.Param)
        )
