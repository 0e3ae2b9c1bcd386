"""Decodes tokens with a key-value cache: one prefill, then one compiled loop."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.ends import check_has_logits
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.backends import Operations
from jaxscale.parallel.mesh import DATA, TENSOR
from jaxscale.parallel.region import Region
from jaxscale.serve.caches import empty_caches
from jaxscale.serve.sampling import SamplingConfig, sample, token_keys
from jaxscale.types import Array, InputError, Params, check_positive

PADDING = -1  # position of a token that nobody sees


def generate_tokens(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos_id: int | None = None,
    sequences: Sequence[int] | None = None,
    num_tokens: int | None = None,
    region: Region | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        decoder: the model; the cache is of its compute type.
        params: the parameter tree.
        prompts: token ids of each prompt, of any lengths.
        sampling: how tokens are drawn.
        max_new_tokens: longest continuation.
        eos_id: token that ends a continuation; None for no such token.
        sequences: number of each prompt, from which its draws derive whatever batch it is in; by
            default its index.
        num_tokens: only tokens below are drawn, where the tokenizer knows fewer than the model;
            None for all.
        region: of a mesh whose tensor groups each have the model and take a share of the prompts,
            see `parallel.region.make_serving_operations`; None for one device.
    Returns:
        The new tokens of each prompt, up to and including the end token.
    Raises:
        InputError: a prompt is empty, too long for the model, or has a token that the model does
            not know.
    Cost: compiles once per number of prompts, prompt length rounded up to a power of two, and
        `max_new_tokens`. A text that outgrows LongRoPE's original length begins a prefill of all
        texts, with a compilation of its own.
    """
    check_prompts(prompts, decoder.config, max_new_tokens)
    numbers = list(range(len(prompts)) if sequences is None else sequences)
    outputs: list[list[int]] = [[] for _ in prompts]
    rows, left = list(range(len(prompts))), max_new_tokens
    while rows and left:
        texts = [[*prompts[row], *outputs[row]] for row in rows]
        num = min(left, _until_switch(texts, decoder.config))
        new = _generate(
            decoder,
            params,
            texts,
            sampling=sampling,
            max_new_tokens=num,
            eos_id=eos_id,
            numbers=[numbers[row] for row in rows],
            num_tokens=num_tokens,
            region=region,
        )
        for row, tokens in zip(rows, new, strict=True):
            outputs[row] += tokens
        rows = [row for row in rows if eos_id is None or eos_id not in outputs[row]]
        left -= num
    return outputs


def _until_switch(texts: Sequence[Sequence[int]], config: ModelConfig) -> float:
    """How many tokens all texts can be continued by until one needs other rotary positions.

    The keys in the cache are then of the old ones, and so is all that they were made of from the
    second layer on: the cache is filled anew.
    """
    lengths = [len(text) for text in texts]
    rest = [
        switch - length + 1
        for switch in config.switch_lengths
        for length in lengths
        if length <= switch
    ]
    return min(rest, default=math.inf)


def _generate(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos_id: int | None,
    numbers: Sequence[int],
    num_tokens: int | None,
    region: Region | None,
) -> list[list[int]]:
    """One prefill and one loop; `numbers` are the sequences, the rest is as `generate_tokens`."""
    # Each tensor group has as many rows; those that fill up are the last prompt once more.
    num_more = 0 if region is None else -len(prompts) % region.mesh.shape[DATA]
    num_prompts = len(prompts)
    prompts = [*prompts, *[prompts[-1]] * num_more]
    numbers = [*numbers, *[numbers[-1]] * num_more]
    tokens, positions = _pad_left(prompts)
    loop = Loop(
        decoder,
        dataclasses.replace(sampling, seed=0),  # the seed is data: another one compiles nothing
        max_new_tokens,
        eos_id,
        num_tokens,
    )
    sequences = np.asarray(numbers, np.int32)
    key = jax.random.key(sampling.seed)
    output = compiled(loop, region)(params, tokens, positions, sequences, key)
    return [_until(row, eos_id) for row in np.asarray(output)[:num_prompts].tolist()]


def advance(
    decoder: Decoder,
    params: Params,
    tokens: Array,
    positions: Array,
    caches: Any,
) -> tuple[Array, Any]:
    """Runs new tokens through the model, whether prompts or one token a row.

    Args:
        decoder: its attention is `ops.attention.cache.prefill` or `attend`.
        params: the parameter tree.
        tokens: [B, T] int32.
        positions: [B, T] int32, PADDING where there is no token; padding stands on the left.
        caches: of the tokens before.
    Returns:
        (logits of the last token [B, V], caches with the new tokens).
    """
    batch = {"tokens": tokens, "positions": positions}
    batch["weights"] = (positions != PADDING).astype(jnp.float32)
    x = decoder.embed(params, batch)
    x, caches, _ = decoder.run_layers(params, x, decoder.tokens(batch), caches)
    h = decoder.hidden(params, x[:, -1:])
    return decoder.unembed(params, h)[:, 0], caches


def with_attention(decoder: Decoder, attention: Any) -> Decoder:
    """The decoder with another attention backend."""
    backends = dataclasses.replace(decoder.operations.backends, attention=attention)
    operations = Operations(decoder.operations.collectives, backends)
    return dataclasses.replace(decoder, operations=operations)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "output", "is_finished", "caches"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _State:
    """State of the loop.

    Args:
        count: [] new tokens a row so far.
        output: [B, max_new_tokens] the tokens.
        is_finished: [B] rows that have drawn the end token.
        caches: of all tokens but the last.
    """

    count: Array
    output: Array
    is_finished: Array
    caches: Any


class _Draws(NamedTuple):
    """How tokens are drawn from logits [B, V]; arguments as `generate_tokens` and `token_keys`."""

    sampling: SamplingConfig
    num_tokens: int | None
    sequences: Array
    key: Array

    def __call__(self, logits: Array, positions: Array) -> Array:
        keys = token_keys(self.key, self.sequences, positions)
        return sample(logits[:, : self.num_tokens], keys, self.sampling)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a compiled decoding depends on; arguments as `generate_tokens`."""

    decoder: Decoder
    sampling: SamplingConfig
    max_new_tokens: int
    eos_id: int | None
    num_tokens: int | None

    def __call__(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        sequences: Array,
        key: Array,
        *,
        tensor: int = 1,
    ) -> Array:
        """Left-padded prompts [B, T] to new tokens [B, max_new_tokens].

        What comes after the end token is filled up with it.
        """
        backend = self.decoder.execution.attention
        prefill = functools.partial(kv_cache.prefill, implementation=backend)
        # Converted and taken apart once, before the loop: its steps read every weight anyway, and
        # would write them too.
        params = self.decoder.prepared(params)
        capacity = tokens.shape[1] + self.max_new_tokens - 1  # the last token drawn is not run
        caches = empty_caches(self.decoder, len(tokens), capacity, tensor)
        first_pass = with_attention(self.decoder, prefill)
        logits, caches = advance(first_pass, params, tokens, positions, caches)
        draws = _Draws(self.sampling, self.num_tokens, sequences, key)
        lengths = positions[:, -1] + 1
        return self.onwards(params, caches, lengths, draws(logits, lengths), draws)[0]

    def onwards(
        self,
        params: Params,
        caches: Any,
        lengths: Array,
        first: Array,
        draw: Callable[[Array, Array], Array],
    ) -> tuple[Array, Any]:
        """The new tokens [B, max_new_tokens] of rows whose caches are filled, and the caches.

        Args:
            params: as `Decoder.prepared` returns them.
            caches: as of `empty_caches`, with the prompts.
            lengths: [B] tokens of each prompt.
            first: [B] the first new tokens.
            draw: logits [B, V] and the positions [B] of what is drawn -> tokens [B].
        """
        end = PADDING if self.eos_id is None else self.eos_id
        # In a loop over layers a kernel would need one more copy of each layer's cache.
        backend = "xla" if self.decoder.execution.is_scanned else None
        attend = functools.partial(kv_cache.attend, implementation=backend)
        next_pass = with_attention(self.decoder, attend)

        def is_going(state: _State) -> Array:
            return (state.count < self.max_new_tokens) & ~state.is_finished.all()

        def decode(state: _State) -> _State:
            last = lax.dynamic_slice_in_dim(state.output, state.count - 1, 1, axis=1)
            position = lengths + state.count - 1
            logits, caches = advance(next_pass, params, last, position[:, None], state.caches)
            token = jnp.where(state.is_finished, end, draw(logits, position + 1))
            put = lax.dynamic_update_slice_in_dim
            output = put(state.output, token[:, None], state.count, axis=1)
            is_finished = state.is_finished | (token == end)
            return _State(state.count + 1, output, is_finished, caches)

        output = jnp.full((len(first), self.max_new_tokens), end, jnp.int32)
        output = output.at[:, 0].set(first)
        start = _State(jnp.int32(1), output, first == end, caches)
        end_state = lax.while_loop(is_going, decode, start)
        return end_state.output, end_state.caches


@functools.lru_cache(maxsize=64)
def compiled(loop: Loop, region: Region | None) -> Callable:
    """The loop as a program of its own; arguments as of `Loop`, `region` as `generate_tokens`."""
    if region is None:
        return jax.jit(loop)
    local = functools.partial(loop, tensor=region.mesh.shape[TENSOR])
    rows, everywhere = PartitionSpec(DATA), PartitionSpec()
    spread = region.forward(local, in_specs=(rows, rows, rows, everywhere), out_specs=rows)
    return jax.jit(spread, out_shardings=NamedSharding(region.mesh, everywhere))


def check_prompts(
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    max_new_tokens: int,
    parameter: str = "prompts",
) -> None:
    """Raises InputError for a model that writes nothing, and a prompt that it cannot continue."""
    check_positive("max_new_tokens", max_new_tokens)
    if not config.is_causal:
        raise InputError("ModelConfig.is_causal", False, "True for a model that continues prompts")
    check_has_logits(config)
    if not prompts:
        raise InputError(parameter, prompts, "at least one prompt")
    for i, prompt in enumerate(prompts):
        name, length = f"{parameter}[{i}]", len(prompt)
        if not length:
            raise InputError(name, list(prompt), "at least one token")
        if unknown := [token for token in prompt if not 0 <= token < config.vocab_size]:
            expected = f"tokens with 0 <= token < vocab_size = {config.vocab_size}"
            raise InputError(name, unknown[0], expected)
        total = length + max_new_tokens - 1  # the last token drawn is not run
        if total > config.max_length:
            expected = (
                f"prompt + max_new_tokens - 1 <= model.max_length = {config.max_length}, "
                f"here {length} + {max_new_tokens} - 1 = {total}"
            )
            raise InputError(name, f"{length} tokens", expected)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions [B, T]; T is a power of two, so that lengths share a compilation."""
    width = 1 << (max(map(len, prompts)) - 1).bit_length()
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), PADDING, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
    """The tokens up to and including the first end token."""
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
