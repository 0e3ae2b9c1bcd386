"""The decoder against a layer-by-layer numpy forward, and ways to run it against one another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ByChunk, ExecutionConfig
from jaxscale.models.layers import Layer
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.backends import Backends, Operations
from jaxscale.ops.precision import Policy
from tests.models.examples import (
    EXPERTS,
    FLOAT32,
    HEADS,
    MODELS,
    SHAPE,
    expected,
    logits_of,
    make_batch,
    make_params,
)
from tests.models.naive import layer_params

UNROLLED = ExecutionConfig(is_scanned=False)
CHUNKED = ExecutionConfig(strategy=ByChunk(4))
CACHED = Operations(backends=Backends(attention=kv_cache.attend))
NO_CUT = Operations()


def default_and_long(name, *others):
    return [name, *(pytest.param(other, marks=pytest.mark.long) for other in others)]


def assert_logits(name, got, tolerance=2e-5):
    atol = tolerance * np.abs(expected(name)).max()
    np.testing.assert_allclose(got, expected(name), atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_naive_forward(name):
    assert_logits(name, logits_of(name)(make_params(MODELS[name]), make_batch()))


@pytest.mark.parametrize("name", default_and_long("mixture", "gemma"))
def test_unrolled_equals_scanned(name):
    assert_logits(name, logits_of(name, UNROLLED)(make_params(MODELS[name]), make_batch()))


@pytest.mark.parametrize("name", default_and_long("side_by_side", "post_norms", "bidirectional"))
def test_layers_by_chunk_equal_whole_ones(name):
    """Attention's input is made twice by chunks: for the projections, and for what comes after."""
    assert_logits(name, logits_of(name, CHUNKED)(make_params(MODELS[name]), make_batch()))


def test_queries_keys_and_values_are_one_matmul():
    config, x = MODELS["llama"], jnp.zeros((2, 16, MODELS["llama"].model_dim))
    params = layer_params(make_params(config), config, 0)
    layer = Layer(params, config.pattern[0], config.norm, NO_CUT)
    jaxpr = jax.make_jaxpr(lambda x: layer.qkv(x, make_batch()["positions"]))(x)
    assert str(jaxpr).count("dot_general[") == 1


def test_logits_in_bfloat16_are_near():
    """The default policy computes in bfloat16 and returns float32."""
    run = logits_of("llama", policy=Policy())
    logits = run(make_params(MODELS["llama"]), make_batch())
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9  # not rounded on the way
    assert_logits("llama", logits, tolerance=0.05)


@pytest.mark.parametrize("name", default_and_long("mixture", "gemma"))
def test_a_layer_runs_over_chunks_of_the_sequence(name):
    """Layer by layer, chunk by chunk, with a layer's functions and a cache, as a long sequence."""
    config, batch = MODELS[name], make_batch()
    params = make_params(config)
    decoder = Decoder(config, CACHED, FLOAT32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(kind, params, x, context, cache):
        layer = Layer(params, kind, config.norm, CACHED)
        x, h = layer.enter_attention(x)
        q, k, v = layer.qkv(h, context.positions)
        o, cache = layer.attend(q, k, v, context, cache)
        return layer.finish(x, h, layer.output(o))[0], cache

    x = decoder.embed(params, batch)
    for number, kind in enumerate(config.layers):
        cache = kv_cache.empty_cache(2, 16, kind.attention.num_kv_heads, 8, "float32")
        layer, chunks = layer_params(params, config, number), []
        for start in (0, 4, 8, 12):
            chunk = slice(start, start + 4)
            context = AttentionContext(batch["positions"][:, chunk], batch["segments"][:, chunk])
            out, cache = run(kind, layer, x[:, chunk], context, cache)
            chunks.append(out)
        x = jnp.concatenate(chunks, 1)
    logits = decoder.unembed(params, decoder.hidden(params, x))
    np.testing.assert_allclose(logits, expected(name), atol=2e-5)


@pytest.mark.parametrize("name", default_and_long("mixture", "gpt2"))
def test_a_flat_ragged_row_equals_separate_rows(name):
    """All in rows of one shape, so that one program runs them; rows are filled up with padding."""
    params, run = make_params(MODELS[name]), logits_of(name)
    rng, lengths = np.random.default_rng(2), (5, 3, 7, 1)
    documents = [rng.integers(0, 40, length) for length in lengths]

    def rows_of(*rows):
        """Logits [B, 16, V] of rows of documents."""
        batch = {name: np.zeros((2, 16), int) for name in ("tokens", "positions", "segments")}
        for i, row in enumerate(rows):
            length = sum(map(len, row))
            batch["tokens"][i, :length] = np.concatenate(row)
            batch["positions"][i, :length] = np.concatenate([np.arange(len(d)) for d in row])
            batch["segments"][i, :length] = np.repeat(range(1, len(row) + 1), [*map(len, row)])
        whole = {"labels": batch["tokens"], "weights": np.float32(batch["segments"] > 0)}
        return run(params, jax.tree.map(jnp.asarray, batch | whole))

    first, second = rows_of(documents[:1], documents[1:2]), rows_of(documents[2:3], documents[3:])
    alone = [row[:n] for row, n in zip([*first, *second], lengths, strict=True)]
    together = rows_of(documents)[0]
    np.testing.assert_allclose(together, jnp.concatenate(alone), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("is_scanned", [True, False])
def test_cached_logits_equal_the_full_forward(is_scanned):
    """A prompt at once and then a token at a time, through the prefix and the stacks.

    By default tests/serve asks this of prompts of one document a row.
    """
    config, batch = MODELS["mixture"], make_batch()
    execution = ExecutionConfig(is_scanned=is_scanned)
    decoder = Decoder(config, CACHED, FLOAT32, execution)
    run = jax.jit(decoder.logits)
    empty = kv_cache.empty_cache(2, 16, 2, 8, "float32")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * config.num_periods), empty)
    caches = {"prefix": {"0": empty}, "layers": {str(i): stacked for i in range(config.period)}}
    logits = []
    for piece in (slice(0, 13), slice(13, 14), slice(14, 15), slice(15, 16)):
        part = {name: array[:, piece] for name, array in batch.items()}
        out, caches = run(make_params(config), part, caches)
        logits.append(out)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected("mixture"), atol=2e-5)


def small_mixture():
    """One layer of either kind."""
    shape = SHAPE | EXPERTS | {"num_layers": 2, "moe_pattern": (True,)}
    return from_flat(**shape, num_dense_prefix=1)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(small_mixture(), id="small"),
        *(pytest.param(MODELS[n], id=n, marks=pytest.mark.long) for n in ("mixture", "llama")),
    ],
)
def test_the_loss_of_one_document_has_no_gradient_in_another(config):
    """The packing leak through the whole stack, at the embeddings of the packed row."""
    params, batch = make_params(config), make_batch()
    execution = ExecutionConfig(is_scanned=False, remat="none")
    decoder = Decoder(config, policy=FLOAT32, execution=execution)
    second = batch["segments"] == 2

    def loss(x, batch):
        x, _, _ = decoder.run_layers(params, x, decoder.tokens(batch))
        return (x**2).sum(-1).sum(where=second)

    gradient = jax.jit(jax.grad(loss))(decoder.embed(params, batch), batch)
    assert (gradient[~second] == 0).all()
    assert (jnp.abs(gradient[second]).max(-1) > 0).all()


def test_without_a_causal_mask_and_positions_the_order_of_tokens_does_not_matter():
    """Logits are those of the tokens in the other order; with a causal mask they are not."""
    order = np.random.default_rng(3).permutation(16)
    batch = {"tokens": make_batch()["tokens"], "positions": jnp.zeros((2, 16), int)}
    batch["positions"] += jnp.arange(16)
    shuffled = batch | {"tokens": batch["tokens"][:, order]}
    layer = LayerConfig(AttentionConfig(**HEADS, rotary=None), FeedForwardConfig(24))
    config = ModelConfig(vocab_size=40, num_layers=2, model_dim=16, max_length=16, pattern=(layer,))
    for is_causal in (False, True):
        decoder = Decoder(dataclasses.replace(config, is_causal=is_causal), policy=FLOAT32)
        run = jax.jit(decoder.logits)
        got, _ = run(make_params(config), shuffled)
        plain, _ = run(make_params(config), batch)
        is_same = np.allclose(got, plain[:, order], atol=1e-5)
        assert is_same is not is_causal


def embed(params, config, batch, policy):
    return Decoder(config, policy=policy).embed(params, batch)


@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
def test_a_frequent_token_gets_its_whole_gradient_in_bfloat16(parameters):
    """1,024 occurrences of one token: a sum in bfloat16 would stop growing at 256 of them."""
    config = from_flat(**SHAPE | {"max_length": 1024})
    config = dataclasses.replace(config, use_learned_positions=True, num_token_types=2)
    zeros = jnp.zeros((1, 1024), int)
    batch = {"tokens": zeros, "positions": zeros, "types": zeros}
    rows = {"tokens": 40, "positions": 1024, "types": 2}
    params = {"embedding": {name: jnp.ones((num, 16), parameters) for name, num in rows.items()}}

    @jax.jit
    @jax.grad
    def gradient(params):
        policy = Policy(parameters=parameters)
        return embed(params, config, batch, policy).astype(jnp.float32).sum()

    for of_table in gradient(params)["embedding"].values():
        np.testing.assert_array_equal(of_table[0], 1024)


def test_a_position_outside_the_learned_table_reads_its_last_row():
    """Such as that of padding."""
    config = MODELS["gpt2"]
    batch = {"tokens": jnp.zeros((1, 3), int), "positions": jnp.asarray([[15, 16, 99]])}
    x = jax.jit(lambda params: embed(params, config, batch, FLOAT32))(make_params(config))
    np.testing.assert_array_equal(x[0], jnp.broadcast_to(x[0, 0], x[0].shape))


# Parameters in the types that a forward uses


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[]
)
@dataclasses.dataclass
class Quantised:
    values: jax.Array
    scale: jax.Array


def used(config, section, params):
    return Decoder(config).to_compute(section, params)


def test_a_small_update_of_a_norm_scale_counts_in_bfloat16():
    scale = used(MODELS["llama"], "final_norm", {"scale": jnp.full(16, 1 + 2.0**-12)})["scale"]
    assert (scale > 1).all()


def test_the_router_keeps_its_type():
    """In bfloat16 it would choose other experts for some tokens."""
    weights = {"router": jnp.ones(3), "experts": {"up": jnp.ones(3)}}
    moe = used(MODELS["mixture"], "layers/1", {"moe": weights})["moe"]
    assert moe["router"].dtype == jnp.float32
    assert moe["experts"]["up"].dtype == jnp.bfloat16


def test_what_is_added_in_float32_keeps_its_type_and_all_else_is_converted():
    """Norms, the router and the bias of the logits, but no bias of a projection."""
    config = MODELS["grin"]
    params = make_params(config)
    converted = {name: used(config, name, params[name]) for name in params}
    kept = {p for p, leaf in tree.flatten(converted).items() if leaf.dtype == jnp.float32}
    layers = [
        f"layers/{i}/{part}" for i, ffn in enumerate(("ffn", "moe")) for part in ("attention", ffn)
    ]
    norms = [f"{place}/norm" for place in layers] + ["final_norm"]
    wanted = {f"{norm}/{name}" for norm in norms for name in ("scale", "bias")}
    assert kept == wanted | {"layers/1/moe/router", "head/bias"}


def test_a_parameter_may_be_a_tree_of_arrays():
    """Such as quantised values with their scales, which keep their type."""
    weights = {"q": Quantised(jnp.ones((2, 2), jnp.int8), jnp.ones(2))}
    q = used(MODELS["llama"], "layers/0", {"attention": weights})["attention"]["q"]
    assert (q.values.dtype, q.scale.dtype) == (jnp.int8, jnp.float32)


def test_two_models_live_in_one_compiled_function():
    """A policy and its reference, of different shapes."""
    names = "llama", "gpt2"

    @jax.jit
    def difference(first, second, batch):
        return logits_of("llama")(first, batch) - logits_of("gpt2")(second, batch)

    got = difference(*(make_params(MODELS[name]) for name in names), make_batch())
    np.testing.assert_allclose(got, expected("llama") - expected("gpt2"), atol=5e-5)
