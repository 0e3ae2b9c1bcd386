"""The decoder against a layer-by-layer numpy forward, and the ways to run it against one another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxscale.models import layers, transformer
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import abstract_params
from jaxscale.models.transformer import StackConfig, forward
from jaxscale.ops.attention import KERNEL_OUTPUT, AttentionContext
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.loss import unembed
from jaxscale.ops.operations import EXCHANGED, Operations
from jaxscale.ops.precision import Policy

FLOAT32 = Policy(compute="float32")
SHAPE = dict(
    vocab_size=40,
    num_layers=4,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    max_length=16,
)
EXPERTS = dict(num_experts=4, expert_dim=12, moe_pattern=(False, True))
MODELS = {
    "llama": ModelConfig(**SHAPE),
    "gpt2": ModelConfig(
        **SHAPE | {"num_kv_heads": 4},
        norm="layernorm",
        use_bias=True,
        activation="gelu",
        positions="learned",
        is_tied=True,
    ),
    "gemma": ModelConfig(
        **SHAPE | {"num_kv_heads": 1},
        activation="geglu",
        windows=(None, 3),
        use_qk_norm=True,
        logit_softcap=3.0,
        attention_softcap=2.0,
        rope_theta=500.0,
    ),
    "gated_biases": ModelConfig(
        **SHAPE, use_bias=True, norm="layernorm", use_qk_norm=True, windows=(2,)
    ),
    "no_positions": ModelConfig(**SHAPE, positions="none", norm="layernorm", norm_epsilon=0.1),
    "mixture": ModelConfig(
        **SHAPE | EXPERTS | {"num_layers": 5}, num_dense_prefix=1, windows=(4, None)
    ),
    "switch": ModelConfig(**SHAPE | EXPERTS, num_active_experts=1, activation="gelu"),
    "grin": ModelConfig(
        **SHAPE | EXPERTS,
        router="sparsemixer_v2",
        router_threshold=0.5,
        norm="layernorm",
        use_bias=True,
        use_head_bias=True,
        windows=(5,),
    ),
}


@functools.cache
def make_params(name):
    """No leaf at a value that would hide it: norm scales are not 1 and biases not 0."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.asarray(
            rng.normal(path[-1].key == "scale", 0.15, p.shape), jnp.float32
        ),
        abstract_params(MODELS[name], "float32"),
    )


def make_batch(rows=2, lengths=(5, 7, 4)):
    """Two documents and padding a row."""
    total = sum(lengths)
    tokens = np.random.default_rng(1).integers(0, 40, (rows, total + 1))
    tile = functools.partial(np.tile, reps=(rows, 1))
    segments = tile(np.repeat([1, 2, 0], lengths))
    return jax.tree.map(
        jnp.asarray,
        dict(
            tokens=tokens[:, :-1],
            labels=tokens[:, 1:],
            weights=(segments > 0).astype("float32"),
            segments=segments,
            positions=tile(np.concatenate([np.arange(n) for n in lengths])),
        ),
    )


def layer_params(params, config, number):
    """The parameters of one layer, taken from its place in the prefix or in the stacks."""
    if number < config.num_dense_prefix:
        return params["prefix"][str(number)]
    number -= config.num_dense_prefix
    return jax.tree.map(
        lambda p: p[number // config.period], params["layers"][str(number % config.period)]
    )


class Naive:
    """The decoder's formulas in float64, a row, a head and a token at a time; shares nothing with the library."""

    def __init__(self, params, config):
        self.params, self.config = jax.tree.map(lambda p: np.asarray(p, np.float64), params), config

    def norm(self, p, x):
        if self.config.norm == "rmsnorm":
            return (
                x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_epsilon) * p["scale"]
            )
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt(x.var(-1, keepdims=True) + self.config.norm_epsilon) * p["scale"]
        return y + p["bias"] if self.config.use_bias else y

    def head(self, p, h, name, n, positions):
        y = h @ p[name][:, n] + (p[f"{name}_bias"][n] if self.config.use_bias else 0)
        if name != "v" and self.config.use_qk_norm:
            y = self.norm(p[f"{name}_norm"], y)
        if name == "v" or self.config.positions != "rope":
            return y
        half = y.shape[-1] // 2
        angles = positions[:, None] * self.config.rope_theta ** (-np.arange(half) / half)
        z = (y[:, :half] + 1j * y[:, half:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], -1)

    def attention(self, p, x, positions, segments, window):
        config, h = self.config, self.norm(p["norm"], x)
        t = np.arange(len(x))
        sees = (
            (t[:, None] >= t)
            & (segments[:, None] == segments)
            & (t[:, None] - t < (window or len(x)))
        )
        y = p["o_bias"] if config.use_bias else 0
        for n in range(config.num_heads):
            q = self.head(p, h, "q", n, positions)
            k, v = (
                self.head(p, h, s, n * config.num_kv_heads // config.num_heads, positions)
                for s in "kv"
            )
            logits = q @ k.T / np.sqrt(config.head_dim)
            if config.attention_softcap:
                logits = config.attention_softcap * np.tanh(logits / config.attention_softcap)
            weights = np.exp(logits) * sees
            y = y + weights / weights.sum(-1, keepdims=True) @ v @ p["o"][n]
        return x + y

    def feed_forward(self, p, h):
        up, gate = (h @ p[s] + p.get(f"{s}_bias", 0) if s in p else None for s in ("up", "gate"))
        x = up if gate is None else gate
        gelu = x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        activated = x / (1 + np.exp(-x)) if self.config.activation == "swiglu" else gelu
        hidden = activated if gate is None else activated * up
        return hidden @ p["down"] + p.get("down_bias", 0)

    def experts(self, p, h):
        out = np.zeros_like(h)
        for t, token in enumerate(h):
            for e, gate in self.gates(token @ p["router"]):
                out[t] += gate * self.feed_forward(
                    {s: w[e] for s, w in p["experts"].items()}, token
                )
        return out

    def gates(self, z):
        config, left = self.config, list(range(len(z)))
        chosen = np.argsort(-z)[: config.num_active_experts]
        if config.router == "gshard":
            total = np.exp(z[chosen] if len(chosen) > 1 else z).sum()
            return [(e, np.exp(z[e]) / total) for e in chosen]
        gates = []
        for e in chosen:  # the largest of those left
            near = [
                i for i in left if z[e] - z[i] <= config.router_threshold * (abs(z[i]) + abs(z[e]))
            ]
            gates.append((e, np.exp(z[e]) / np.exp(z[near]).sum()))
            left.remove(e)
        return gates

    def row(self, tokens, positions, segments):
        p, config = self.params, self.config
        x = p["embedding"]["tokens"][tokens]
        if config.positions == "learned":
            x = x + p["embedding"]["positions"][positions]
        for number in range(config.num_layers):
            layer = layer_params(p, config, number)
            in_pattern = (
                number if number < config.num_dense_prefix else number - config.num_dense_prefix
            )
            window = config.windows[in_pattern % len(config.windows)]
            x = self.attention(layer["attention"], x, positions, segments, window)
            name, run = ("moe", self.experts) if "moe" in layer else ("ffn", self.feed_forward)
            x = x + run(layer[name], self.norm(layer[name]["norm"], x))
        table = p["embedding"]["tokens"] if config.is_tied else p["head"]["weights"]
        logits = self.norm(p["final_norm"], x) @ table.T + (
            p["head"]["bias"] if config.use_head_bias else 0
        )
        return (
            config.logit_softcap * np.tanh(logits / config.logit_softcap)
            if config.logit_softcap
            else logits
        )


@functools.cache
def expected(name):
    batch = jax.tree.map(np.asarray, make_batch())
    naive = Naive(make_params(name), MODELS[name])
    return np.stack(
        [naive.row(*row) for row in zip(batch["tokens"], batch["positions"], batch["segments"])]
    )


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_naive_forward(name):
    run = jax.jit(functools.partial(forward, config=MODELS[name], policy=FLOAT32))
    logits, _ = run(make_params(name), make_batch())
    np.testing.assert_allclose(logits, expected(name), atol=2e-5 * np.abs(expected(name)).max())


@pytest.mark.parametrize("name", ["mixture", pytest.param("gemma", marks=pytest.mark.long)])
def test_unrolled_equals_scanned(name):
    run = jax.jit(
        functools.partial(
            forward, config=MODELS[name], policy=FLOAT32, stack=StackConfig(is_scanned=False)
        )
    )
    np.testing.assert_allclose(run(make_params(name), make_batch())[0], expected(name), atol=2e-5)


def test_queries_keys_and_values_are_one_matmul():
    config, x = MODELS["llama"], jnp.zeros((2, 16, MODELS["llama"].model_dim))
    layer = layer_params(make_params("llama"), config, 0)
    jaxpr = jax.make_jaxpr(lambda x: layers.qkv(layer, x, make_batch()["positions"], config))(x)
    assert str(jaxpr).count("dot_general[") == 1


@pytest.mark.parametrize("name, times", [(KERNEL_OUTPUT, 1), (EXCHANGED, 1), ("residual", 2)])
def test_what_is_dear_is_not_made_again_under_remat_dots(name, times):
    layer = StackConfig(remat="dots").rematerialise(
        lambda x: jnp.exp(checkpoint_name(jnp.sin(x), name))
    )
    jaxpr = jax.make_jaxpr(jax.grad(layer))(1.0)
    assert str(jaxpr).count("= sin ") == times


@pytest.mark.parametrize("names, times", [(("attention",), 1), (("q",), 2)])
def test_remat_of_names_keeps_attention_with_what_its_kernel_leaves_for_the_backward(names, times):
    stack = StackConfig(remat="names", saved_names=names)
    layer = stack.rematerialise(lambda x: jnp.exp(checkpoint_name(jnp.sin(x), KERNEL_OUTPUT)))
    assert str(jax.make_jaxpr(jax.grad(layer))(1.0)).count("= sin ") == times


@pytest.mark.parametrize(
    "settings",
    [dict(remat=r) for r in ("full", "dots")] + [dict(remat="names", saved_names=("q",))],
)
def test_a_router_s_logits_are_not_made_again(settings):
    """They could differ in the last bit, and a draw of the backward from that of the forward."""
    run = functools.partial(
        forward, config=MODELS["mixture"], policy=FLOAT32, stack=StackConfig(**settings)
    )
    jaxpr = str(
        jax.make_jaxpr(jax.grad(lambda params: run(params, make_batch())[0].sum()))(
            make_params("mixture")
        )
    )
    assert jaxpr.count("name=router") == sum(kind.is_moe for kind in MODELS["mixture"].pattern)


def test_logits_in_bfloat16_are_near():
    """The default policy computes in bfloat16 and returns float32."""
    logits, _ = jax.jit(functools.partial(forward, config=MODELS["llama"]))(
        make_params("llama"), make_batch()
    )
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9  # not rounded on the way
    np.testing.assert_allclose(
        logits, expected("llama"), atol=0.05 * np.abs(expected("llama")).max()
    )


@pytest.mark.parametrize("name", ["mixture", pytest.param("gemma", marks=pytest.mark.long)])
def test_a_layer_runs_over_chunks_of_the_sequence(name):
    """Layer by layer, chunk by chunk, with the functions of a layer and a cache, as a long sequence would run."""
    config, params, batch = MODELS[name], make_params(name), make_batch()
    operations = Operations(attention=jax.jit(kv_cache.attend))
    x = transformer.embed(params, batch, config, operations, FLOAT32)
    for number, kind in enumerate(config.layers):
        layer, chunks = layer_params(params, config, number), []
        cache = kv_cache.empty_cache(2, 16, config.num_kv_heads, config.head_dim, "float32")
        for chunk in (slice(0, 6), slice(6, 12), slice(12, 16)):
            positions, weights = batch["positions"][:, chunk], batch["weights"][:, chunk]
            context = AttentionContext(
                positions, batch["segments"][:, chunk], softcap=config.attention_softcap
            )
            h = layers.normalise(layer["attention"]["norm"], x[:, chunk], config)
            q, k, v = layers.qkv(layer, h, positions, config)
            o, cache = layers.attend(q, k, v, context, cache, kind, operations)
            y = layers.output(layer, o)
            chunks.append(layers.finish(layer, x[:, chunk], y, weights, config, operations)[0])
        x = jnp.concatenate(chunks, 1)
    h = transformer.final_hidden(params, x, config, operations, FLOAT32)
    logits = unembed(
        h, transformer.unembedding(params, config, operations, FLOAT32), config.logit_softcap
    )
    np.testing.assert_allclose(logits, expected(name), atol=2e-5)


@pytest.mark.parametrize("name", ["mixture", pytest.param("gpt2", marks=pytest.mark.long)])
def test_a_flat_ragged_row_equals_separate_rows(name):
    lengths = (5, 3, 7, 1)
    tokens = np.random.default_rng(2).integers(0, 40, (4, 7))
    rows = {"tokens": tokens, "positions": np.tile(np.arange(7), (4, 1))}
    flat = {
        "tokens": np.concatenate([tokens[i, :n] for i, n in enumerate(lengths)])[None],
        "positions": np.concatenate([np.arange(n) for n in lengths])[None],
        "segments": np.repeat([1, 2, 3, 4], lengths)[None],
    }
    run = jax.jit(functools.partial(forward, config=MODELS[name], policy=FLOAT32))
    separate, _ = run(make_params(name), jax.tree.map(jnp.asarray, rows))
    together, _ = run(make_params(name), jax.tree.map(jnp.asarray, flat))
    wanted = jnp.concatenate([separate[i, :n] for i, n in enumerate(lengths)])
    np.testing.assert_allclose(together[0], wanted, atol=1e-5)


@pytest.mark.parametrize("is_scanned", [True, False])
def test_cached_logits_equal_the_full_forward(is_scanned):
    """A prompt at once and then a token at a time, through the prefix and the stacks."""
    config, params, batch = MODELS["mixture"], make_params("mixture"), make_batch()
    run = jax.jit(
        functools.partial(
            forward,
            config=config,
            policy=FLOAT32,
            operations=Operations(attention=kv_cache.attend),
            stack=StackConfig(is_scanned=is_scanned),
        )
    )
    empty = kv_cache.empty_cache(2, 16, 2, 8, "float32")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * config.num_periods), empty)
    caches = {"prefix": {"0": empty}, "layers": {str(i): stacked for i in range(config.period)}}
    logits = []
    for piece in (slice(0, 13), slice(13, 14), slice(14, 15), slice(15, 16)):
        out, caches = run(params, jax.tree.map(lambda a: a[:, piece], batch), caches)  # noqa: B023
        logits.append(out)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected("mixture"), atol=2e-5)


@pytest.mark.parametrize("name", ["mixture", pytest.param("llama", marks=pytest.mark.long)])
def test_the_loss_of_one_document_has_no_gradient_in_another(name):
    """The packing leak through the whole stack, at the embeddings of the packed row."""
    config, params, batch = MODELS[name], make_params(name), make_batch()
    operations = Operations()
    second = batch["segments"] == 2

    def loss(x, batch):
        context = transformer.attention_context(batch, config)
        settings = dict(config=config, operations=operations, policy=FLOAT32)
        x, _, _ = transformer.run_layers(
            params, x, context, batch["weights"], stack=StackConfig(), **settings
        )
        return (x**2).sum(-1).sum(where=second)

    x = transformer.embed(params, batch, config, operations, FLOAT32)
    gradient = jax.jit(jax.grad(loss))(x, batch)
    assert (gradient[~second] == 0).all()
    assert (jnp.abs(gradient[second]).max(-1) > 0).all()


def test_a_frequent_token_gets_its_whole_gradient_in_bfloat16():
    """1,024 occurrences of one token: summed in bfloat16 their gradient would stop growing at 256 of them."""
    config = ModelConfig(**SHAPE | {"max_length": 1024})
    batch = {"tokens": jnp.zeros((1, 1024), int), "positions": jnp.arange(1024)[None]}
    params = {"embedding": {"tokens": jnp.ones((40, 16))}}

    def total(params):
        return (
            transformer.embed(params, batch, config, Operations(), Policy())
            .astype(jnp.float32)
            .sum()
        )

    np.testing.assert_array_equal(jax.grad(total)(params)["embedding"]["tokens"][0], 1024)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[]
)
@dataclasses.dataclass
class Quantised:
    values: jax.Array
    scale: jax.Array


def test_a_small_update_of_a_norm_scale_counts_in_bfloat16():
    scale = jnp.full(16, 1 + 2.0**-12)
    used = transformer.use({"scale": scale}, "final_norm", Operations(), Policy())
    assert (used["scale"] > 1).all()


def test_the_router_keeps_its_type():
    """In bfloat16 it would choose other experts for some tokens."""
    layer = transformer.use(
        {"moe": {"router": jnp.ones(3), "up": jnp.ones(3)}}, "layers/0", Operations(), Policy()
    )
    assert (layer["moe"]["router"].dtype, layer["moe"]["up"].dtype) == (jnp.float32, jnp.bfloat16)


def test_a_parameter_may_be_a_tree_of_arrays():
    """Such as quantised values with their scales, which keep their type."""
    weights = {"q": Quantised(jnp.ones((2, 2), jnp.int8), jnp.ones(2))}
    used = transformer.use(weights, "layers/0", Operations(), Policy())
    assert (used["q"].values.dtype, used["q"].scale.dtype) == (jnp.int8, jnp.float32)


def test_two_models_live_in_one_compiled_function():
    """A policy and its reference, of different shapes."""

    @jax.jit
    def difference(first, second, batch):
        one, _ = forward(first, batch, config=MODELS["llama"], policy=FLOAT32)
        other, _ = forward(second, batch, config=MODELS["gpt2"], policy=FLOAT32)
        return one - other

    got = difference(make_params("llama"), make_params("gpt2"), make_batch())
    np.testing.assert_allclose(got, expected("llama") - expected("gpt2"), atol=5e-5)
