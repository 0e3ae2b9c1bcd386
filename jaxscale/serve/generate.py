"""Generates tokens with a key-value cache: one prefill, then one compiled decode loop."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.data.loader import check_tokenizer
from jaxscale.data.tokenizer import Tokenizer, TokenizerConfig, check_vocabulary, load_tokenizer
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.models import transformer
from jaxscale.models.config import ModelConfig, checkpoint_facts
from jaxscale.models.parameters import abstract_params
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.loss import unembed
from jaxscale.ops.operations import Operations
from jaxscale.ops.precision import Policy
from jaxscale.serve.sampling import SamplingConfig, sample, token_keys
from jaxscale.types import Array, InputError, Params, check_positive

PADDING = -1  # position of a token that nobody sees
STACK = StackConfig(remat="none")
OPERATIONS = Operations(attention=kv_cache.attend)


def generate(
    *,
    directory: str,
    model: ModelConfig,
    tokenizer: TokenizerConfig,
    checkpoint: CheckpointConfig,
    prompts: tuple[str, ...] | str,
    max_new_tokens: int = 100,
    sampling: SamplingConfig = SamplingConfig(),
    policy: Policy = Policy(),
    step: int | None = None,
    runtime: RuntimeConfig = RuntimeConfig(),
) -> list[str]:
    """Continues prompts with a trained model, on one device, and prints each with its continuation.

    Args:
        directory: of the run, as `train.pretrain.pretrain` had it.
        model: the model.
        tokenizer: the one the model was trained with.
        checkpoint: its directory is relative to `directory`.
        prompts: one or more texts.
        max_new_tokens: longest continuation, in tokens; it ends earlier where the model ends the
            document.
        sampling: how tokens are drawn.
        policy: dtypes.
        step: which checkpoint; the newest when None.
        runtime: platform and flags.
    Returns:
        The continuations, without the prompts.
    Raises:
        InputError: no such checkpoint, it had another tokenizer, or a prompt is empty or too long
            for the model.
    """
    apply_runtime(runtime, str(Path(directory).expanduser()))
    prompts = (prompts,) if isinstance(prompts, str) else prompts
    loaded = load_tokenizer(tokenizer)
    check_vocabulary(loaded, model.vocab_size)
    ids = [loaded.encode(prompt) for prompt in prompts]
    _check_prompts(ids, model, max_new_tokens)
    params = _restore(checkpoint.within(directory), model, loaded, policy, step)
    outputs = generate_tokens(
        params,
        ids,
        config=model,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        eos_id=loaded.eos_id,
        policy=policy,
        num_tokens=loaded.vocab_size,
    )
    texts = [loaded.decode(output) for output in outputs]
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}\n")
    return texts


def generate_tokens(
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    config: ModelConfig,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos_id: int | None = None,
    policy: Policy = Policy(),
    sequences: Sequence[int] | None = None,
    num_tokens: int | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        params: the parameter tree.
        prompts: token ids of each prompt, of any lengths.
        config: the model.
        sampling: how tokens are drawn.
        max_new_tokens: longest continuation.
        eos_id: token that ends a continuation; None for no such token.
        policy: dtypes; the cache is of the compute type.
        sequences: number of each prompt, from which its draws derive whatever batch it is in; by
            default its index.
        num_tokens: only tokens below are drawn, where the tokenizer knows fewer than the model;
            None for all.
    Returns:
        The new tokens of each prompt, up to and including the end token.
    Raises:
        InputError: a prompt is empty, too long for the model, or has a token that the model does
            not know.
    Cost: compiles once per number of prompts, prompt length rounded up to a power of two, and
        `max_new_tokens`.
    """
    _check_prompts(prompts, config, max_new_tokens)
    tokens, positions = _pad_left(prompts)
    numbers = np.asarray(range(len(prompts)) if sequences is None else sequences, np.int32)
    output = _generate(
        params,
        tokens,
        positions,
        numbers,
        jax.random.key(sampling.seed),
        config=config,
        sampling=dataclasses.replace(
            sampling, seed=0
        ),  # the seed is data: another one compiles nothing
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        policy=policy,
        num_tokens=num_tokens,
    )
    return [_until(row, eos_id) for row in np.asarray(output).tolist()]


def empty_caches(config: ModelConfig, batch_size: int, capacity: int, dtype: str) -> dict[str, Any]:
    """Caches for `transformer.run_layers`: one a prefix layer, one stack a position of the pattern."""
    cache = kv_cache.empty_cache(batch_size, capacity, config.num_kv_heads, config.head_dim, dtype)
    stacked = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (config.num_periods, *leaf.shape)), cache
    )
    return {
        "prefix": {str(i): cache for i in range(len(config.prefix))},
        "layers": {str(i): stacked for i in range(config.period)},
    }


def advance(
    params: Params,
    tokens: Array,
    positions: Array,
    caches: Any,
    *,
    config: ModelConfig,
    policy: Policy,
) -> tuple[Array, Any]:
    """Runs new tokens through the model, whether a prompt or one token.

    Args:
        params: the parameter tree.
        tokens: [B, T] int32.
        positions: [B, T] int32, PADDING where there is no token; padding stands on the left.
        caches: of the tokens before.
    Returns:
        (logits of the last token [B, V], caches with the new tokens).
    """
    batch = {"tokens": tokens, "positions": positions}
    settings = dict(config=config, operations=OPERATIONS, policy=policy)
    x = transformer.embed(params, batch, **settings)
    context = transformer.attention_context(batch, config)
    weights = (positions != PADDING).astype(jnp.float32)
    x, caches, _ = transformer.run_layers(
        params, x, context, weights, caches, stack=STACK, **settings
    )
    h = transformer.final_hidden(params, x[:, -1:], **settings)
    return unembed(h, transformer.unembedding(params, **settings), config.logit_softcap)[
        :, 0
    ], caches


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "output", "is_finished", "caches"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Decoding:
    """State of the loop: new tokens a row so far [], the tokens [B, max_new_tokens], finished rows [B], the caches."""

    count: Array
    output: Array
    is_finished: Array
    caches: Any


@functools.partial(
    jax.jit,
    static_argnames=("config", "sampling", "max_new_tokens", "eos_id", "policy", "num_tokens"),
)
def _generate(
    params: Params,
    tokens: Array,
    positions: Array,
    sequences: Array,
    key: Array,
    *,
    config: ModelConfig,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos_id: int | None,
    policy: Policy,
    num_tokens: int | None,
) -> Array:
    """Left-padded prompts [B, T] to new tokens [B, max_new_tokens], filled up with the end token."""
    end = PADDING if eos_id is None else eos_id
    lengths = positions[:, -1] + 1
    run = functools.partial(advance, params, config=config, policy=policy)

    def draw(logits: Array, positions: Array) -> Array:
        return sample(logits[:, :num_tokens], token_keys(key, sequences, positions), sampling)

    def is_going(state: _Decoding) -> Array:
        return (state.count < max_new_tokens) & ~state.is_finished.all()

    def decode(state: _Decoding) -> _Decoding:
        last = lax.dynamic_slice_in_dim(state.output, state.count - 1, 1, axis=1)
        position = lengths + state.count - 1
        logits, caches = run(last, position[:, None], state.caches)
        token = jnp.where(state.is_finished, end, draw(logits, position + 1))
        output = lax.dynamic_update_slice_in_dim(state.output, token[:, None], state.count, axis=1)
        return _Decoding(state.count + 1, output, state.is_finished | (token == end), caches)

    capacity = tokens.shape[1] + max_new_tokens - 1  # the last token drawn is not run
    logits, caches = run(
        tokens, positions, empty_caches(config, len(tokens), capacity, policy.compute)
    )
    first = draw(logits, lengths)
    output = jnp.full((len(tokens), max_new_tokens), end, jnp.int32).at[:, 0].set(first)
    return lax.while_loop(
        is_going, decode, _Decoding(jnp.int32(1), output, first == end, caches)
    ).output


def _check_prompts(
    prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int
) -> None:
    check_positive("max_new_tokens", max_new_tokens)
    if not prompts:
        raise InputError("prompts", prompts, "at least one prompt")
    for i, prompt in enumerate(prompts):
        name, length = f"prompts[{i}]", len(prompt)
        if not length:
            raise InputError(name, list(prompt), "at least one token")
        if unknown := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise InputError(
                name, unknown[0], f"tokens with 0 <= token < vocab_size = {config.vocab_size}"
            )
        if length + max_new_tokens > config.max_length:
            equation = f"{length} + {max_new_tokens} = {length + max_new_tokens}"
            expected = f"prompt + max_new_tokens <= model.max_length = {config.max_length}, here {equation}"
            raise InputError(name, f"{length} tokens", expected)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions [B, T], T a power of two so that prompts of many lengths share a compilation."""
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


def _restore(
    checkpoint: CheckpointConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    policy: Policy,
    step: int | None,
) -> Params:
    """The parameters alone, on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        abstract_params(model, policy.parameters),
    )
    checkpoints = Checkpoints(checkpoint, **checkpoint_facts(model))
    try:
        check_tokenizer(checkpoints.data_state(step), tokenizer)
        return checkpoints.restore_params(abstract, step)
    finally:
        checkpoints.close()
