"""The decoder: embed, run the layers, unembed; a bound configuration, and plain functions of it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale import tree
from jaxscale.models import by_row, ends
from jaxscale.models.config import LayerConfig, ModelConfig
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.few_tokens import fused
from jaxscale.models.joined import joined
from jaxscale.models.layers import Layer
from jaxscale.models.lora import adapted, selected
from jaxscale.models.moe import RouterSums, no_router, router_sums
from jaxscale.models.parameters import in_order_of_use, parameter_table
from jaxscale.models.quantised import dequantised
from jaxscale.models.unroll import periods_of, scanned_with_caches, unrolled
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.backends import Operations
from jaxscale.ops.collectives import Collectives
from jaxscale.ops.draws import EMBEDDING, Draws
from jaxscale.ops.loss import Head
from jaxscale.ops.precision import Policy, cast
from jaxscale.ops.rotary import document_lengths
from jaxscale.types import Array, Batch, Params, Role

# A router in low precision picks other experts (GRIN keeps it in float32). A scale next to 1 has
# steps of 2^-7 in bfloat16, so that an update of it would be lost.
KEPT_IN_PARAMETER_TYPE = (Role.ROUTER, Role.NORM, Role.LOGIT_BIAS, Role.VALUE)


class Tokens(NamedTuple):
    """What is known of the tokens of a batch besides their residual.

    Args:
        context: mask structure of the tokens [B, T].
        weights: [B, T], 0 for padding, which the router's figures leave out.
        draws: what the tokens draw in training; None in evaluation and serving.
        adapters: [B, T, sum of R], see `lora.selected`; None where tokens do not choose.
    """

    context: AttentionContext
    weights: Array
    draws: Draws | None = None
    adapters: Array | None = None


class Periods(NamedTuple):
    """Periods of the stack, of those that a pipeline stage holds.

    Args:
        number: [periods] of each, counted from the model's first.
        is_real: [periods] bool, false for one to skip; None skips none.
    """

    number: Array
    is_real: Array | None = None


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model's configuration, bound to what computes and exchanges, the types and the execution.

    Args:
        config: the model.
        operations: what a mesh injects; by default those of one device.
        policy: dtypes.
        execution: how the layers run.
    """

    config: ModelConfig
    operations: Operations = Operations()
    policy: Policy = Policy()
    execution: ExecutionConfig = ExecutionConfig()

    def logits(
        self,
        params: Params,
        batch: Batch,
        caches: Any = None,
    ) -> tuple[Array, Any]:
        """Logits of every token.

        Args:
            params: the parameter tree.
            batch: tokens and positions [B, T] int32; optionally segments and weights.
            caches: as in `run_layers`.
        Returns:
            (logits [B, T, V] in `policy.output`, caches).
        """
        tokens = self.tokens(batch)
        x = self.embed(params, batch)
        x, caches, _ = self.run_layers(params, x, tokens, caches)
        logits = self.unembed(params, self.hidden(params, x))
        return logits.astype(self.policy.output), caches

    def tokens(self, batch: Batch) -> Tokens:
        """What is known of a batch's tokens; without `segments` a row is one document."""
        positions, segments, lengths = batch["positions"], batch.get("segments"), None
        if self.config.switch_lengths:
            lengths = document_lengths(positions, segments, self.operations.collectives.whole_rows)
        context = AttentionContext(
            positions=positions,
            segments=segments,
            lengths=lengths,
            is_causal=self.config.is_causal,
        )
        weights = batch.get("weights")
        if weights is None:
            weights = jnp.ones(batch["tokens"].shape, jnp.float32)
        draws = Draws(batch["token_keys"]) if "token_keys" in batch else None
        return Tokens(context, weights, draws, batch.get("adapters"))

    # The parts of a forward, in their order

    def embed(self, params: Params, batch: Batch) -> Array:
        """Tokens [B, T] to the residual [B, own T, D].

        Looked up in the parameter type, to which the gradient of a row, the sum over all
        occurrences of its token, is then rounded. Positions outside a learned table, as of padding,
        read its last row.
        """
        gather = self.operations.collectives.gather_parameters
        embedding = gather("embedding", params["embedding"])
        x = self.operations.backends.embed(embedding["tokens"], batch["tokens"])
        own_tokens = self.operations.collectives.own_tokens
        x = ends.complete(embedding, x, batch, self.config, own_tokens)
        return self.operations.backends.name("embedding", x.astype(self.policy.compute))

    def add_noise(
        self,
        x: Array,
        draws: Draws,
        width: float,
    ) -> Array:
        """The residual [B, own T, D] plus uniform noise from -`width` to `width`.

        Source: Jain et al. 2023, NEFTune (arXiv 2310.05914), algorithm 1; its width is
            alpha / sqrt(T D).
        """
        own_keys = self.operations.collectives.own_tokens(draws.keys)
        uniform = dataclasses.replace(draws, keys=own_keys).numbers(EMBEDDING, x.shape[-1])
        return x + (width * (2 * uniform - 1)).astype(x.dtype)

    def run_layers(
        self,
        params: Params,
        x: Array,
        tokens: Tokens,
        caches: Any = None,
    ) -> tuple[Array, Any, list[RouterSums]]:
        """Runs the prefix and the whole stack.

        Args:
            params: the whole tree.
            x: residual [B, own T, D].
            tokens: what is known of the tokens.
            caches: {"prefix": as in `run_prefix`, "layers": as in `run_stack`} or None.
        Returns:
            (residual, caches, RouterSums as `run_stack`).
        """
        caches = caches or {"prefix": None, "layers": None}
        x, prefix = self.run_prefix(params, x, tokens, caches["prefix"])
        x, stack, sums = self.run_stack(params["layers"], x, tokens, caches["layers"])
        return x, {"prefix": prefix, "layers": stack}, sums

    def run_prefix(
        self,
        params: Params,
        x: Array,
        tokens: Tokens,
        caches: Any = None,
    ) -> tuple[Array, Any]:
        """Runs the layers before the stack.

        Args:
            params: the whole tree; only `prefix` is read.
            x: residual [B, own T, D].
            tokens: what is known of the tokens.
            caches: {i: cache} or None, owned by the attention backend.
        Returns:
            (residual, caches).
        """
        caches, new = caches or {}, {}
        tokens = tokens._replace(draws=None)  # its layers are dense and draw nothing
        for i, config in enumerate(self.config.prefix):
            run = self._rematerialised_layer(config, f"prefix/{i}")
            name = str(i)
            x, new[name], _ = run(params["prefix"][name], x, tokens, caches.get(name))
        return x, new

    def run_stack(
        self,
        params: Params,
        x: Array,
        tokens: Tokens,
        caches: Any = None,
        periods: Periods | None = None,
    ) -> tuple[Array, Any, list[RouterSums]]:
        """Runs periods of the repeating pattern: all of them, or those that a stage holds.

        Args:
            params: the tree `layers`, leaves [periods, ...]; or, for an unrolled stack, a tuple of
                the periods' trees.
            x: residual [B, own T, D].
            tokens: what is known of the tokens.
            caches: {position in the pattern: cache}, leaves [periods, ...], or for an unrolled
                stack a tuple of the periods'; None without caches. They are carried from layer to
                layer and written in place.
            periods: which of the model's periods these are; None for all of them in order.
        Returns:
            (residual, caches, RouterSums of [periods] for each position of the pattern).
        """

        def period(x: Array, inputs: tuple[Params, Any, Periods]) -> tuple[Array, tuple]:
            params, caches, here = inputs
            run = functools.partial(self._run_period, params, caches, tokens, here.number)
            if here.is_real is None:
                return run(x)
            shapes = jax.eval_shape(run, x)[1]
            skipped = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return lax.cond(here.is_real, run, lambda x: (x, skipped), x)

        if periods is None:
            is_apart = isinstance(params, tuple)
            num = len(params) if is_apart else len(jax.tree.leaves(params)[0])
            periods = Periods(jnp.arange(num))
        if not self.execution.is_scanned:
            # All layers are converted at once: then the gradient is stacked in the compute type, at
            # half the bytes.
            params = self.to_compute("layers", params)
            x, (caches, sums) = unrolled(period, x, (params, caches or {}, periods))
            return x, caches, sums
        if not caches:
            x, (_, sums) = self.execution.scan(period, x, (params, {}, periods))
            return x, {}, sums
        return scanned_with_caches(period, x, params, caches, periods)

    def hidden(self, params: Params, x: Array) -> Array:
        """Final norm: residual [B, own T, D] to the unembedding's input [B, T, D]."""
        norm = self._use("final_norm", params["final_norm"])
        norm = by_row.prepared(norm) if by_row.are_ends_by_row(self) else norm
        h = self._by_token(lambda x: ends.finished(norm, x, self.config), x)
        if self.config.unembedding_scale != 1:
            h = h * self.config.unembedding_scale
        h = self.operations.collectives.gather_tokens(h)
        return self.operations.backends.name("final_norm", h)

    def head(self, params: Params) -> Array | Head:
        """The unembedding matrix [V, D], with its bias where it has one (on a mesh: local rows)."""
        ends.check_has_logits(self.config)
        head = self._use("head", params["head"]) if "head" in params else {}
        if self.config.is_tied:
            head["weights"] = self._use("embedding", params["embedding"])["tokens"]
        return Head(**head) if self.config.use_head_bias else head["weights"]

    def unembed(self, params: Params, h: Array) -> Array:
        """Logits [B, T, V] of h [B, T, D], in at least float32."""
        head, softcap = self.head(params), self.config.logit_softcap
        logits = by_row.logits if by_row.are_ends_by_row(self) else self.operations.backends.logits
        return self._by_token(lambda h: logits(h, head, softcap), h)

    def token_loss(
        self,
        h: Array,
        head: Array | Head,
        labels: Array,
    ) -> tuple[Array, Array]:
        """(nll, log-normaliser) [B, own T] of h [B, T, D] and labels [B, T], see `TokenLoss`."""
        softcap = self.config.logit_softcap
        if not self.execution.is_batch_invariant:
            return self.operations.backends.token_loss(h, head, labels, softcap)
        num_rows = None if by_row.are_ends_by_row(self) else self.execution.strategy.num_rows
        return by_row.token_loss(softcap, num_rows)(h, head, labels)

    def _by_token(self, f: Callable, arrays: Any) -> Any:
        """f of arrays [B, T, ...], which treats each token by itself."""
        if self.execution.is_batch_invariant and not by_row.are_ends_by_row(self):
            return self.execution.strategy.over_tiles(f, arrays)
        return f(arrays)

    # Parameters

    def to_compute(self, section: str, params: Params) -> Params:
        """Parameters of a section in the compute type, but for routers and norms.

        The arrays of a parameter that has several, such as quantised values with their scales, keep
        their types too. A tuple of the periods' trees stands for the section "layers".
        """
        if isinstance(params, tuple):
            return tuple(self.to_compute(section, each) for each in params)

        def one(path: str, leaf: Array) -> Array:
            role = self._role(f"{section}{tree.SEPARATOR}{path}")
            is_kept = role is None or role in KEPT_IN_PARAMETER_TYPE
            return leaf if is_kept else cast(leaf, self.policy.compute)

        return tree.map_with_path(one, params)

    def prepared(self, params: Params) -> Params:
        """The tree converted once for many forwards without gradients, and unrolled layers apart.

        Every forward converts what is not yet in the compute type, so that it computes the same.
        """
        ready = {name: self.to_compute(name, part) for name, part in params.items()}
        if self.config.use_learned_positions or self.config.num_token_types:
            ready["embedding"] = params["embedding"]  # both vectors are added in their own type
        if not self.execution.is_scanned:
            ready["layers"] = tuple(periods_of(ready["layers"]))
            # Those of a mesh stay apart, for their parts are gathered by their names; and so do
            # those whose products must have the shapes that training has.
            is_alone, periods = self.operations.collectives == Collectives(), ready["layers"]
            if is_alone and by_row.are_shapes_free(self, periods):
                ready["layers"] = joined(periods)
        return ready

    def _use(self, section: str, params: Params) -> Params:
        """Parameters of a section as a forward uses them: in the compute type, gathered."""
        # In this order, for then the gather moves bytes of the compute type.
        gather = self.operations.collectives.gather_parameters
        return gather(section, self.to_compute(section, params))

    def _role(self, path: str) -> Role | None:
        """The role of the parameter at a path; None for an array inside a parameter of several."""
        return _roles(self.config).get(path)

    # One layer, one period

    def _run_layer(
        self,
        config: LayerConfig,
        section: str,
        params: Params,
        x: Array,
        tokens: Tokens,
        cache: Any,
    ) -> tuple[Array, Any, RouterSums]:
        """One layer: residual [B, own T, D], cache and its router's sums."""
        operations = self._named(section)
        params = self._use(section, params)
        if tokens.adapters is None:
            params = adapted(params, self.config.lora)
        else:
            params = selected(params, tokens.adapters)
        if "moe" in params:  # whose products take whole matrices
            params = params | {"moe": dequantised(params["moe"], self.policy.compute)}
        layer = fused(Layer(params, config, self.config.norm, operations), x)
        run = self.execution.strategy
        x, cache, choices = run(layer, x, tokens.context, cache, tokens.draws)
        if choices is None:
            return x, cache, no_router(self.config.num_experts)
        sums = router_sums(choices, tokens.weights, config.feed_forward, operations)
        return x, cache, sums

    def _rematerialised_layer(self, config: LayerConfig, section: str) -> Callable:
        run = functools.partial(self._run_layer, config, section)
        return self.execution.rematerialise(run)

    def _run_period(
        self,
        params: Params,
        caches: Any,
        tokens: Tokens,
        number: Array,
        x: Array,
    ) -> tuple[Array, tuple[Any, list[RouterSums]]]:
        first = len(self.config.prefix) + number * self.config.period
        new, sums = {}, []
        for i, config in enumerate(self.config.pattern):
            name = str(i)
            draws = None if tokens.draws is None else tokens.draws.at(first + i)
            run = self._rematerialised_layer(config, f"layers/{i}")
            of_layer = tokens._replace(draws=draws)
            x, new[name], of_router = run(params[name], x, of_layer, caches.get(name))
            sums.append(of_router)
        return x, (new, sums)

    def _named(self, section: str) -> Operations:
        """The operations, whose tensors' names begin with the section."""
        backends = self.operations.backends

        def name(path: str, x: Array) -> Array:
            return backends.name(f"{section}/{path}", x)

        return dataclasses.replace(
            self.operations, backends=dataclasses.replace(backends, name=name)
        )


@functools.cache
def _roles(config: ModelConfig) -> dict[str, Role]:
    table = parameter_table(config)
    return {path: parameter.role for path, parameter in in_order_of_use(table)}
