"""The compiled programs of the engine: a forward over the pages, and the draw behind it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models.execution import BatchInvariant
from jaxscale.ops.attention import paged
from jaxscale.serve import drawing, packing
from jaxscale.serve.decoding import with_attention
from jaxscale.serve.drawing import DrawKind
from jaxscale.serve.packing import RowShape, StepShape
from jaxscale.serve.placement import Placement
from jaxscale.types import Array, Params

FACTORS = "adapter_factors"  # where `lora.factor_table` stands beside the parameters


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["is_in_prompt", "counts"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Seen:
    """What penalties are taken for.

    Args:
        is_in_prompt: [slots, V] bool.
        counts: [slots, V] int32, how often each token was drawn.
    """

    is_in_prompt: Array
    counts: Array


@functools.partial(jax.jit, donate_argnums=0)
def write_seen(
    seen: Seen,
    slot: Array,
    is_in_prompt: Array,
    counts: Array,
) -> Seen:
    """Takes a sequence's tokens [V] into the row of its slot."""
    return Seen(
        is_in_prompt=seen.is_in_prompt.at[slot].set(is_in_prompt),
        counts=seen.counts.at[slot].set(counts),
    )


@functools.cache
def forward_program(placement: Placement, shape: StepShape) -> Any:
    """(params, caches, last tokens, packed) -> (logits [R, V], the packed rows, caches)."""

    def forward(
        params: Params,
        caches: Any,
        last_tokens: Array,
        packed: Array,
    ) -> tuple[Array, Array, Any]:
        fields = packing.unpack(shape, packed)
        logits, caches = _forward(placement, shape, params, caches, last_tokens, fields)
        return logits, packed[-shape.rows.num_words :], caches

    spread = placement.spread(forward)
    return jax.jit(spread, donate_argnums=1, compiler_options=_options())


@functools.cache
def loop_program(
    placement: Placement,
    shape: StepShape,
    num_tokens: int,
    kind: DrawKind,
    num_steps: int,
) -> Any:
    """(params, caches, (last tokens, seen or None), packed) -> (caches, the same, drawn).

    Several steps of single tokens, on one device, as `forward_program` and `draw_program` one after
    the other. What was drawn is (tokens [steps, R], logprobs, with the same leading dim, or None).
    """
    drawing_step = _Draw(shape.rows, num_tokens, kind, placement.invariant)

    def loop(
        params: Params,
        caches: Any,
        state: tuple[Array, Seen | None],
        packed: Array,
    ) -> tuple[Any, tuple[Array, Seen | None], tuple[Array, tuple | None]]:
        fields = packing.unpack(shape, packed)

        def step(carry: tuple, number: Array) -> tuple[tuple, tuple]:
            caches, state = carry
            here = packing.after(shape, fields, number)
            logits, caches = _forward(placement, shape, params, caches, state[0], here)
            state, tokens, logprobs = drawing_step(state, logits, here, None)
            return (caches, state), (tokens, logprobs)

        (caches, state), drawn = lax.scan(step, (caches, state), jnp.arange(num_steps))
        return caches, state, drawn

    return jax.jit(loop, donate_argnums=(1, 2), compiler_options=_options())


def _forward(
    placement: Placement,
    shape: StepShape,
    params: Params,
    caches: Any,
    last_tokens: Array,
    fields: dict[str, Array],
) -> tuple[Array, Any]:
    """(logits [R, V], caches) of one step."""
    implementation = "invariant" if placement.invariant else None
    attend = functools.partial(
        paged.attend, rows=packing.ragged_rows(fields), implementation=implementation
    )
    model, num = with_attention(placement.decoder, attend), shape.num_single
    tokens = fields["tokens"]
    drawn = last_tokens.at[fields["slot"][:num]].get(mode="fill", fill_value=0)
    single = jnp.where(tokens[:num] < 0, drawn, tokens[:num])
    # Not by `at[:num]`, whose scatter has no indices: in a manual region the partitioner of jax
    # 0.11 crashes at an array without elements.
    tokens = jnp.concatenate([single, tokens[num:]])
    positions = fields["positions"]
    batch = {"tokens": tokens[None], "positions": positions[None]}
    batch["weights"] = (positions >= 0).astype(jnp.float32)[None]
    if FACTORS in params:
        batch["adapters"] = params[FACTORS]["table"][fields["adapters"]][None]
    x = model.embed(params, batch)
    known = model.tokens(batch)
    if known.context.lengths is not None:
        # Of whole sequences, of which the row has pieces.
        context = dataclasses.replace(known.context, lengths=fields["lengths"][None])
        known = known._replace(context=context)
    x, caches, _ = model.run_layers(params, x, known, caches)
    h = model.hidden(params, x[:, fields["last_place"]])
    return model.unembed(params, h)[0], caches


def _options() -> dict[str, bool]:
    """Flags of these programs, whatever those of the process are.

    On an H200 XLA's own matmuls decode 7 to 16 % faster than cuBLAS; and before one of cuBLAS the
    weights of several projections would be copied together in every step. A slice may not be
    handed to our kernels where it lies, for they want their inputs at multiples of 256 bytes.
    """
    if jax.default_backend() != "gpu":
        return {}
    return {"xla_gpu_enable_triton_gemm": True, "xla_gpu_enable_dynamic_slice_fusion": False}


@functools.cache
def draw_program(
    shape: RowShape,
    num_tokens: int,
    kind: DrawKind,
    invariant: BatchInvariant | None = None,
) -> Any:
    """((last tokens, seen or None), logits, rows, masks) -> (the same, tokens [1, R], logprobs).

    Masks are those of grammars, [R, words] int32, or None; logprobs, [1, R, ...], None where nobody
    asks. With a strategy `invariant` a row's results do not depend on the others in any bit.
    """

    drawing_step = _Draw(shape, num_tokens, kind, invariant)

    def draw(
        state: tuple[Array, Seen | None],
        logits: Array,
        packed_rows: Array,
        masks: Array | None,
    ) -> tuple[tuple[Array, Seen | None], Array, tuple | None]:
        fields = packing.unpack(shape, packed_rows)
        state, *drawn = drawing_step(state, logits, fields, masks)
        return state, *jax.tree.map(lambda x: x[None], drawn)

    return jax.jit(draw, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """The draw of one step; arguments as `draw_program`."""

    shape: RowShape
    num_tokens: int
    kind: DrawKind
    invariant: BatchInvariant | None

    def __call__(
        self,
        state: tuple[Array, Seen | None],
        logits: Array,
        fields: dict[str, Array],
        masks: Array | None,
    ) -> tuple[tuple[Array, Seen | None], Array, tuple | None]:
        last_tokens, seen = state
        changed = logits[:, : self.num_tokens]
        if seen is not None:
            here = jnp.minimum(fields["slot"], self.shape.num_slots - 1)
            rows = packing.penalty_rows(fields)
            changed = drawing.penalise(changed, rows, seen.is_in_prompt[here], seen.counts[here])
        if masks is not None:
            changed = drawing.only_allowed(changed, masks)
        tokens = self._by_row(self._draw_rows, changed, packing.draw_rows(fields))
        to = fields["slot_drawn"]
        last_tokens = last_tokens.at[to].set(tokens, mode="drop")
        if seen is not None:
            counts = seen.counts.at[to, tokens].add(1, mode="drop")
            seen = dataclasses.replace(seen, counts=counts)
        logprobs = None
        if self.kind.has_logprobs:
            of_rows = functools.partial(
                drawing.log_probabilities,
                num_tokens=self.num_tokens,
                is_invariant=self.invariant is not None,
            )
            target = jnp.where(fields["target"] >= 0, fields["target"], tokens)
            logprobs = self._by_row(of_rows, logits, target)
        return (last_tokens, seen), tokens, logprobs

    def _by_row(self, f: Callable, *arrays: Any) -> Any:
        """f of arrays [1, R, ...], which treats each row by itself."""
        arrays = jax.tree.map(lambda x: x[None], arrays)
        of_rows = functools.partial(_star, f)
        found = self.invariant.over_tiles(of_rows, arrays) if self.invariant else of_rows(arrays)
        return jax.tree.map(lambda x: x[0], found)

    def _draw_rows(self, logits: Array, rows: drawing.DrawRows) -> Array:
        squeezed = jax.tree.map(lambda x: x[0], rows)
        return drawing.draw(logits[0], squeezed, self.kind)[None]


def _star(f: Callable, arguments: tuple) -> Any:
    return f(*arguments)
