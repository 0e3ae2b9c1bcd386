"""Small models of every kind, their parameters and a batch, and programs that tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    RotaryConfig,
    TopKRouter,
)
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.precision import Policy
from tests.models.naive import Naive

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
HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=8)
AROUND = dict(vocab_size=40, model_dim=16, max_length=16)

POST_NORMS = ModelConfig(
    **AROUND,
    num_layers=4,
    pattern=(
        LayerConfig(
            AttentionConfig(**HEADS, qk_norm="all", scale=0.3),
            ExpertsConfig(num_experts=4, dim=12, router=TopKRouter(is_renormalised=False)),
            norm_position="after",
        ),
        LayerConfig(
            AttentionConfig(**HEADS, biases=("q", "k", "v"), window=6),
            FeedForwardConfig(24),
            norm_position="both",
        ),
    ),
)
SIDE_BY_SIDE = ModelConfig(
    **AROUND,
    num_layers=3,
    prefix=(
        LayerConfig(
            AttentionConfig(**HEADS, rotary=RotaryConfig(fraction=0.5), biases=("k", "o")),
            FeedForwardConfig(24, "gelu", use_bias=True),
            is_parallel=True,
        ),
    ),
    pattern=(
        LayerConfig(
            AttentionConfig(**HEADS, rotary=RotaryConfig(300.0, fraction=0.5), qk_norm="all"),
            ExpertsConfig(num_experts=4, dim=12),
            is_parallel=True,
        ),
    ),
    norm=NormConfig("layernorm", use_bias=True),
)
BIDIRECTIONAL = ModelConfig(
    **AROUND,
    num_layers=2,
    pattern=(
        LayerConfig(
            AttentionConfig(**HEADS, rotary=None, biases=("q", "k", "v", "o")),
            FeedForwardConfig(24, "gelu", use_bias=True),
            norm_position="after",
        ),
    ),
    norm=NormConfig("layernorm", use_bias=True),
    is_causal=False,
    use_learned_positions=True,
)
MODELS = {
    "llama": from_flat(**SHAPE),
    "gpt2": from_flat(
        **SHAPE | {"num_kv_heads": 4},
        norm="layernorm",
        use_bias=True,
        activation="gelu",
        positions="learned",
        is_tied=True,
    ),
    "gemma": from_flat(
        **SHAPE | {"num_kv_heads": 1},
        activation="geglu",
        windows=(None, 3),
        use_qk_norm=True,
        logit_softcap=3.0,
        attention_softcap=2.0,
        rope_theta=500.0,
    ),
    "gated_biases": from_flat(
        **SHAPE, use_bias=True, norm="layernorm", use_qk_norm=True, windows=(2,)
    ),
    "no_positions": from_flat(**SHAPE, positions="none", norm="layernorm", norm_epsilon=0.1),
    "mixture": from_flat(
        **SHAPE | EXPERTS | {"num_layers": 5}, num_dense_prefix=1, windows=(4, None)
    ),
    "switch": from_flat(**SHAPE | EXPERTS, num_active_experts=1, activation="gelu"),
    "grin": from_flat(
        **SHAPE | EXPERTS,
        router="sparsemixer_v2",
        router_threshold=0.5,
        norm="layernorm",
        use_bias=True,
        use_head_bias=True,
        windows=(5,),
    ),
    "post_norms": POST_NORMS,
    "side_by_side": SIDE_BY_SIDE,
    "bidirectional": BIDIRECTIONAL,
}


@functools.cache
def make_params(config):
    """No leaf at a value that would hide it: norm scales are not 1 and biases not 0."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = float(path[-1].key == "scale")
        return jnp.asarray(rng.normal(mean, 0.15, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(table_of(config), "float32"))


@functools.cache
def table_of(config):
    return parameter_table(config)


def make_batch(rows=2, lengths=(5, 7, 4)):
    """Two documents and padding a row."""
    tokens = np.random.default_rng(1).integers(0, 40, (rows, sum(lengths) + 1))
    segments = np.tile(np.repeat([1, 2, 0], lengths), (rows, 1))
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (rows, 1))
    batch = dict(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        weights=(segments > 0).astype("float32"),
        segments=segments,
        positions=positions,
    )
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def logits_of(name, execution=ExecutionConfig(), policy=FLOAT32):
    """The compiled forward (params, batch) -> logits of a model."""
    decoder = Decoder(MODELS[name], policy=policy, execution=execution)
    return jax.jit(lambda params, batch: decoder.logits(params, batch)[0])


@functools.cache
def expected(name):
    """The logits of `make_batch` by the naive forward."""
    config = MODELS[name]
    return Naive(make_params(config), config).logits(make_batch())
