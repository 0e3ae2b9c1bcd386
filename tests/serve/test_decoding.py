"""Decoding with a cache against the full forward, whatever the batch, the padding and the model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.precision import Policy
from jaxscale.serve.caches import empty_caches
from jaxscale.serve.decoding import (
    PADDING,
    Loop,
    advance,
    generate_tokens,
    with_attention,
)
from jaxscale.serve.sampling import SamplingConfig, sample, token_keys
from jaxscale.types import InputError
from tests.models.examples import POST_NORMS, SIDE_BY_SIDE

FLOAT32 = Policy(compute="float32")
TOLERANCE = 2e-5  # float32 rounding of logits of size 1, summed in another order
GREEDY = SamplingConfig(temperature=0)
UNROLLED = ExecutionConfig(is_scanned=False, remat="none")
SCANNED = ExecutionConfig(remat="none")
SMALL = dict(
    vocab_size=61,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    ffn_dim=32,
    max_length=32,
)


def with_shared_expert(model):
    """The model in whose mixtures each token visits one expert more."""
    layers = (
        dataclasses.replace(
            each, feed_forward=dataclasses.replace(each.feed_forward, shared_dim=12)
        )
        if each.is_moe
        else each
        for each in model.pattern
    )
    return dataclasses.replace(model, pattern=tuple(layers))


MODELS = {
    "dense": from_flat(**SMALL | {"num_layers": 1}),
    "grouped queries, window, qk norm": from_flat(
        **SMALL | {"num_kv_heads": 2},
        windows=(None, 3),
        use_qk_norm=True,
        logit_softcap=5.0,
        attention_softcap=9.0,
    ),
    "learned positions, layernorm": from_flat(
        **SMALL,
        positions="learned",
        norm="layernorm",
        use_bias=True,
        activation="gelu",
        is_tied=True,
    ),
    "experts with prefix, window": with_shared_expert(
        from_flat(
            **SMALL | {"num_layers": 5, "num_kv_heads": 1},
            num_dense_prefix=1,
            windows=(4, None),
            moe_pattern=(False, True),
            num_experts=4,
            expert_dim=16,
        )
    ),
    "post norms, qk norm over all heads": POST_NORMS,
    "side by side, partial rotary": SIDE_BY_SIDE,
}
PROMPTS = [[7, 3, 9, 37, 1], [5], [2, 2, 8]]
NUM_STEPS = 4


def with_layout(model):
    """The model with block-sparse attention in every layer."""
    layout = BlockLayout(local=1, stride=2)
    layers = (
        dataclasses.replace(each, attention=dataclasses.replace(each.attention, layout=layout))
        for each in model.pattern
    )
    return dataclasses.replace(model, pattern=tuple(layers))


@functools.cache
def params_of(config):
    """Normal draws by numpy: to compile `init_params` takes longer than all else here."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jax.device_put((rng.normal(size=leaf.shape) * 0.3).astype(leaf.dtype)),
        abstract_params(parameter_table(config), "float32"),
    )


def decoder_of(config, execution=SCANNED):
    return Decoder(config, policy=FLOAT32, execution=execution)


@functools.cache
def full_forward(config):
    decoder = decoder_of(config)

    @jax.jit
    def run(params, tokens):
        batch = {"tokens": tokens, "positions": jnp.arange(tokens.shape[1])[None]}
        return decoder.logits(params, batch)[0]

    return run


def full_logits(config, tokens):
    """Logits [T, V] of one sequence by the full forward.

    Zeros on the right, which no token sees, fill its row.
    """
    row = np.zeros((1, config.max_length), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(full_forward(config)(params_of(config), row))[0, : len(tokens)]


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        pytest.param("grouped queries, window, qk norm", UNROLLED, id="grouped"),
        pytest.param("learned positions, layernorm", SCANNED, id="learned"),
        pytest.param("experts with prefix, window", SCANNED, id="experts scanned"),
        pytest.param("experts with prefix, window", UNROLLED, id="experts unrolled"),
        pytest.param("dense", SCANNED, id="dense", marks=LONG),
        pytest.param("grouped queries, window, qk norm", SCANNED, id="grouped s.", marks=LONG),
        pytest.param("post norms, qk norm over all heads", SCANNED, id="post norms", marks=LONG),
        pytest.param("side by side, partial rotary", UNROLLED, id="side by side", marks=LONG),
    ],
)
def test_cached_logits_equal_full_forward_logits(name, execution):
    """Ragged prompts padded on the left, then four single tokens a row."""
    config, width = MODELS[name], max(map(len, PROMPTS)) + 2
    decoder, rows = decoder_of(config, execution), []
    for prompt in PROMPTS:
        new = np.random.default_rng(len(prompt)).integers(0, config.vocab_size, NUM_STEPS)
        rows.append([*prompt, *new.tolist()])
    pads = [width - len(prompt) for prompt in PROMPTS]
    padded = [[0] * pad + row for pad, row in zip(pads, rows, strict=True)]
    numbered = [[PADDING] * pad + [*range(len(r))] for pad, r in zip(pads, rows, strict=True)]
    tokens, positions = np.asarray(padded), np.asarray(numbered)

    def compiled(attention):
        step = functools.partial(advance, with_attention(decoder, attention))
        return functools.partial(jax.jit(step), decoder.prepared(params_of(config)))

    caches = empty_caches(decoder, len(PROMPTS), width + NUM_STEPS)
    logits, caches = compiled(kv_cache.prefill)(tokens[:, :width], positions[:, :width], caches)
    run, cached = compiled(kv_cache.attend), [logits]
    for i in range(width, width + NUM_STEPS):
        logits, caches = run(tokens[:, i : i + 1], positions[:, i : i + 1], caches)
        cached.append(logits)
    for row, got in zip(rows, np.stack(cached, 1), strict=True):
        wanted = full_logits(config, row)[-NUM_STEPS - 1 :]
        np.testing.assert_allclose(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def generated(name, prompts=PROMPTS, *, max_new_tokens=8, **settings):
    config = MODELS[name]
    settings = dict(sampling=SamplingConfig(seed=5)) | settings
    decoder = decoder_of(config, settings.pop("execution", SCANNED))
    new = dict(max_new_tokens=max_new_tokens)
    return generate_tokens(decoder, params_of(config), prompts, **new, **settings)


sampled = functools.partial(generated, "dense")


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        pytest.param("grouped queries, window, qk norm", SCANNED, id="grouped"),
        pytest.param("experts with prefix, window", SCANNED, id="experts scanned", marks=LONG),
        pytest.param("experts with prefix, window", UNROLLED, id="experts unrolled", marks=LONG),
        pytest.param("dense", SCANNED, id="dense", marks=LONG),
    ],
)
def test_greedy_is_the_arg_max_of_the_full_forward(name, execution):
    config = MODELS[name]
    rows = generated(name, sampling=GREEDY, execution=execution)
    for prompt, new in zip(PROMPTS, rows, strict=True):
        logits = full_logits(config, [*prompt, *new])
        assert new == np.argmax(logits[len(prompt) - 1 : -1], -1).tolist()


def test_each_draw_is_of_the_full_forwards_logits_with_the_key_of_its_position():
    config, numbers = MODELS["dense"], [3, 9, 1]
    rows = sampled(sequences=numbers)

    @jax.jit
    def draw(logits, number, first):
        count = len(logits)
        positions = first + jnp.arange(count)
        keys = token_keys(jax.random.key(5), jnp.full(count, number), positions)
        return sample(logits, keys, SamplingConfig())

    for prompt, number, new in zip(PROMPTS, numbers, rows, strict=True):
        logits = full_logits(config, [*prompt, *new])[len(prompt) - 1 : -1]
        assert new == draw(logits, number, len(prompt)).tolist()


def test_tokens_that_the_tokenizer_does_not_know_are_not_drawn():
    assert max(map(max, sampled())) >= 20
    drawn = sampled(num_tokens=20)
    assert max(map(max, drawn)) < 20
    assert len({token for row in drawn for token in row}) > 5


def test_seeds_reproduce_and_differ():
    assert sampled() == sampled()
    assert sampled() != sampled(sampling=SamplingConfig(seed=6))
    same = sampled([[1, 2], [1, 2], PROMPTS[0]])
    assert same[0] != same[1], "two sequences with one prompt draw apart"


def test_a_sequence_samples_the_same_alone_and_in_a_batch():
    """Whatever its padding, its row, and how many tokens are wanted."""
    together = sampled()
    assert sampled(PROMPTS[1:2], sequences=[1]) == together[1:2]
    assert sampled(PROMPTS[::-1], sequences=[2, 1, 0]) == together[::-1]
    assert sampled(max_new_tokens=3) == [row[:3] for row in together]


def test_the_end_token_ends_its_row_only():
    free = sampled()
    eos_id = free[1][2]
    stopped = sampled(eos_id=eos_id)
    assert stopped == [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free]
    assert len(stopped[1]) <= 3 < max(map(len, stopped))


@pytest.mark.parametrize(("execution", "num_layers"), [(SCANNED, 8), (UNROLLED, 4)])
def test_decoding_keeps_one_cache_and_little_beside_it(execution, num_layers):
    """Copied for a step, or taken in and out of the loop over layers, it would be there again."""
    batch_size, length, new, heads, head_dim = 2, 16, 2000, 2, 32
    config = from_flat(
        vocab_size=32,
        num_layers=num_layers,
        model_dim=16,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        ffn_dim=16,
        max_length=4096,
    )
    loop = Loop(decoder_of(config, execution), GREEDY, new, None, None)
    tokens = jax.ShapeDtypeStruct((batch_size, length), "int32")
    rows = jax.ShapeDtypeStruct((batch_size,), "int32")
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = abstract_params(parameter_table(config), "float32")
    compiled = jax.jit(loop).lower(params, tokens, tokens, rows, key).compile()
    slots = length + new - 1
    cache_bytes = 2 * 4 * math.prod((num_layers, batch_size, slots, heads, head_dim))
    # The loop makes the cache itself, so that it counts among the temporaries once.
    beside = compiled.memory_analysis().temp_size_in_bytes - cache_bytes
    assert 0 <= beside < cache_bytes / 2


def test_caches_have_the_form_in_which_layers_run():
    """One leaf for all periods, or one a period, of the compute type."""
    config = MODELS["experts with prefix, window"]
    for execution in (SCANNED, UNROLLED):
        decoder = Decoder(config, execution=execution)
        caches = jax.eval_shape(functools.partial(empty_caches, decoder, 3, 7))
        one, stack = caches["prefix"]["0"], caches["layers"]
        assert one.k.shape == one.v.shape == (3, 1, 7, 8)
        assert one.k.dtype == jnp.bfloat16
        if execution is SCANNED:
            assert stack["1"].k.shape == (2, 3, 1, 7, 8)
        else:
            assert len(stack) == 2
            assert stack[1]["1"].k.shape == one.k.shape


def test_a_continuation_may_end_one_token_after_the_model_s_longest_sequence():
    """The last token is drawn and not run."""
    (output,) = sampled([[1] * 29], max_new_tokens=4)
    assert len(output) == 4


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 4, r"prompts: given \[\], expected at least one prompt"),
        ([[1], []], 4, r"prompts\[1\]: given \[\], expected at least one token"),
        (
            [[1], [61]],
            4,
            r"prompts\[1\]: given 61, expected tokens with 0 <= token < vocab_size = 61",
        ),
        ([[-1]], 4, r"prompts\[0\]: given -1"),
        ([[1] * 30], 4, r"<= model.max_length = 32, here 30 \+ 4 - 1 = 33"),
        ([[1]], 0, "max_new_tokens: given 0"),
    ],
)
def test_bad_prompts_are_named(prompts, max_new_tokens, message):
    with pytest.raises(InputError, match=message):
        sampled(prompts, max_new_tokens=max_new_tokens)
