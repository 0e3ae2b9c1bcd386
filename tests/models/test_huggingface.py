"""Logits and routers equal those of Hugging Face's models, which share nothing with ours.

experiments/huggingface_fixtures.py and sparsemixer_fixture.py have made the files in fixtures/.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    NormConfig,
    RotaryConfig,
    SparseMixerRouter,
    TopKRouter,
    YarnScaling,
)
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.sparsemixer import sparsemixer
from jaxscale.ops.draws import Draws
from jaxscale.ops.precision import Policy

FIXTURES = Path(__file__).parent / "fixtures"
AROUND = dict(vocab_size=97, num_layers=2, model_dim=32, max_length=64)
HEADS = dict(num_heads=4, num_kv_heads=2)
ATTENTION = AttentionConfig(**HEADS, head_dim=8)
WIDE = AttentionConfig(**HEADS, head_dim=16)
DENSE = FeedForwardConfig(24)
EXPERTS = ExpertsConfig(num_experts=4, dim=24)
LAYER = LayerConfig(ATTENTION, DENSE)
MODEL = ModelConfig(**AROUND, pattern=(LAYER,))
MAX_ERROR = 2e-5  # relative to the largest logit; both compute in float32


def with_attention(config, attention):
    layers = [dataclasses.replace(layer, attention=attention) for layer in config.pattern]
    return dataclasses.replace(config, pattern=tuple(layers))


def with_rotary(attention, **rotary):
    return dataclasses.replace(attention, rotary=RotaryConfig(**rotary))


def model_of(layer, **fields):
    return dataclasses.replace(MODEL, pattern=(layer,), **fields)


GEMMA2 = LayerConfig(
    dataclasses.replace(ATTENTION, softcap=2.0, scale=12**-0.5),
    FeedForwardConfig(24, "geglu"),
    norm_position="both",
)
GEMMA2_WINDOW = dataclasses.replace(
    GEMMA2, attention=dataclasses.replace(GEMMA2.attention, window=8)
)
ALL_NORM = dataclasses.replace(ATTENTION, qk_norm="all")
BIASED = dataclasses.replace(ATTENTION, biases=("q", "k", "v", "o"))
GRIN = SparseMixerRouter(0.2, mask="released")
NOT_RENORMALISED = TopKRouter(is_renormalised=False)
LAYERNORM = NormConfig("layernorm", 1e-5, use_bias=True)
MODELS = {
    "llama": MODEL,
    "llama3": with_attention(
        MODEL, with_rotary(WIDE, theta=100.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 32))
    ),
    "yarn": with_attention(MODEL, with_rotary(WIDE, scaling=YarnScaling(4.0, 32))),
    "qwen2": dataclasses.replace(
        with_attention(MODEL, dataclasses.replace(ATTENTION, biases=("q", "k", "v"))),
        norm=NormConfig(epsilon=1e-6),
    ),
    "qwen3": dataclasses.replace(
        with_attention(MODEL, dataclasses.replace(WIDE, qk_norm="head")),
        norm=NormConfig(epsilon=1e-6),
        is_tied=True,
    ),
    "gemma2": dataclasses.replace(
        MODEL,
        pattern=(GEMMA2_WINDOW, GEMMA2),
        norm=NormConfig(epsilon=1e-6),
        logit_softcap=8.0,
    ),
    "olmo2": model_of(LayerConfig(ALL_NORM, DENSE, norm_position="after")),
    "olmoe": model_of(LayerConfig(ALL_NORM, dataclasses.replace(EXPERTS, router=NOT_RENORMALISED))),
    "mixtral": model_of(LayerConfig(ATTENTION, EXPERTS)),
    "phimoe": model_of(
        LayerConfig(
            dataclasses.replace(BIASED, window=8), dataclasses.replace(EXPERTS, router=GRIN)
        ),
        norm=LAYERNORM,
        use_head_bias=True,
    ),
    "phi": model_of(
        LayerConfig(
            with_rotary(BIASED, fraction=0.5),
            FeedForwardConfig(24, "gelu", use_bias=True),
            is_parallel=True,
        ),
        norm=LAYERNORM,
        use_head_bias=True,
    ),
}
# Hugging Face's names of our parameters; where there are two, a family has one of them.
PROJECTIONS = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj", "self_attn.dense"),
}
MATRICES = {"gate": ("mlp.gate_proj",), "up": ("mlp.up_proj", "mlp.fc1")}
MATRICES["down"] = ("mlp.down_proj", "mlp.fc2")


class Converter:
    """The state of a model of Hugging Face as our parameter tree.

    Args:
        state: arrays by name.
        config: our configuration of the model.
        scale_offset: added to the scales of norms (1 for Gemma, whose norms multiply by 1 + w).
    """

    def __init__(self, state, config, scale_offset=0.0):
        self.state = {name: array.astype("float32") for name, array in state.items()}
        self.config = config
        self.scale_offset = scale_offset
        self.used = set()

    def take(self, *names):
        """The first of the arrays that there is; each is used."""
        name = next(name for name in names if name in self.state)
        self.used.add(name)
        return self.state[name]

    def linear(self, out, name, places, shape, bias_shape):
        """A matrix [out, in] as ours, [in, out] with heads apart, and its bias if it has one."""
        out[name] = self.take(*(f"{place}.weight" for place in places)).T.reshape(shape)
        for place in places:
            if f"{place}.bias" in self.state:
                out[f"{name}_bias"] = self.take(f"{place}.bias").reshape(bias_shape)

    def norm(self, *places):
        norm = {"scale": self.take(*(f"{place}.weight" for place in places)) + self.scale_offset}
        if self.config.norm.use_bias:
            norm["bias"] = self.take(*(f"{place}.bias" for place in places))
        return norm

    def norms(self, layer, place, before, after):
        """The norms before and after attention or a feed-forward, where the layer has them."""
        out = {}
        if layer.norm_position in ("before", "both"):
            out["norm"] = self.norm(f"{place}{before}")
        if layer.norm_position in ("after", "both"):
            out["norm_after"] = self.norm(f"{place}{after}")
        return out

    def attention(self, layer, place):
        config = layer.attention
        out = self.norms(layer, place, "input_layernorm", "post_attention_layernorm")
        dim, size = self.config.model_dim, config.head_dim
        heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        for name, names in PROJECTIONS.items():
            shape = (dim, heads[name], size) if name in heads else (config.num_heads, size, dim)
            bias_shape = shape[1:] if name in heads else (dim,)
            self.linear(out, name, [place + each for each in names], shape, bias_shape)
        for name in ("q", "k") if config.qk_norm else ():
            scale = self.take(f"{place}self_attn.{name}_norm.weight")
            of_all = config.qk_norm == "all"
            out[f"{name}_norm"] = {"scale": scale.reshape(-1, size) if of_all else scale}
        return out

    def ffn(self, layer, place):
        if layer.is_parallel:
            out = {}
        else:
            is_both = layer.norm_position == "both"
            before = "pre_feedforward_layernorm" if is_both else "post_attention_layernorm"
            out = self.norms(layer, place, before, "post_feedforward_layernorm")
        if layer.is_moe:
            gate, up = np.split(self.take(f"{place}mlp.experts.gate_up_proj").swapaxes(1, 2), 2, -1)
            down = self.take(f"{place}mlp.experts.down_proj").swapaxes(1, 2)
            router = self.take(f"{place}mlp.gate.weight", f"{place}mlp.router.weight").T
            return out | {"router": router, "experts": {"gate": gate, "up": up, "down": down}}
        for name, names in MATRICES.items():
            if name == "gate" and not layer.feed_forward.is_gated:
                continue
            places = [place + each for each in names]
            inner, dim = layer.feed_forward.dim, self.config.model_dim
            shape = (inner, dim) if name == "down" else (dim, inner)
            self.linear(out, name, places, shape, (shape[1],))
        return out

    def layer(self, number):
        layer, place = self.config.layers[number], f"model.layers.{number}."
        name = "moe" if layer.is_moe else "ffn"
        return {"attention": self.attention(layer, place), name: self.ffn(layer, place)}

    def params(self, embedding_factor):
        """The whole tree; embeddings are multiplied by the factor, the unembedding is not."""
        config = self.config
        tokens = self.take("model.embed_tokens.weight")
        stacks = {}
        for position in range(config.period):
            numbers = range(position, config.num_layers, config.period)
            layers = [self.layer(number) for number in numbers]
            stacks[str(position)] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
        params = {
            "embedding": {"tokens": tokens * np.float32(embedding_factor)},
            "layers": stacks,
            "final_norm": self.norm("model.norm", "model.final_layernorm"),
        }
        weights = self.take("lm_head.weight")
        if not config.is_tied:
            params["head"] = {"weights": weights}
        if config.use_head_bias:
            params["head"]["bias"] = self.take("lm_head.bias")
        return params


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal(name):
    config = MODELS[name]
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = dict(file)
    tokens, wanted = arrays.pop("tokens"), arrays.pop("logits")
    is_gemma = name == "gemma2"
    converter = Converter(arrays, config, scale_offset=float(is_gemma))
    params = converter.params(embedding_factor=math.sqrt(32) if is_gemma else 1)
    assert converter.used == arrays.keys()  # nothing that Hugging Face's model has is left out
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(24), (2, 24))}
    execution = ExecutionConfig(remat="none")
    decoder = Decoder(config, policy=Policy(compute="float32"), execution=execution)
    logits, _ = jax.jit(decoder.logits)(params, batch)
    assert np.abs(logits - wanted).max() <= MAX_ERROR * np.abs(wanted).max()


ROTARY = {
    "llama31": RotaryConfig(5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "llama32": RotaryConfig(5e5, scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192)),
    "linear": RotaryConfig(1e4, scaling=LinearScaling(4.0)),
    "yarn": RotaryConfig(1e6, scaling=YarnScaling(4.0, 32768)),
    "yarn_given": RotaryConfig(
        1e4, scaling=YarnScaling(16.0, 4096, beta_fast=24.0, beta_slow=2.0, attention_factor=1.3)
    ),
    "longrope": RotaryConfig(
        1e4,
        scaling=LongRopeScaling(
            (1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0),
            magnitude=math.sqrt(1 + math.log(4) / math.log(64)),
        ),
    ),
}


@pytest.mark.parametrize("name", ROTARY)
def test_frequencies_equal(name):
    """Of heads as large as those of released models; Hugging Face's are float32."""
    case = json.loads((FIXTURES / "rotary.json").read_text())[name]
    with np.load(FIXTURES / "rotary.npz") as file:
        *wanted, magnitude = file[name]
    config = ROTARY[name]
    np.testing.assert_allclose(config.frequencies(case["head_dim"]), wanted, rtol=2e-6)
    assert config.scaling.magnitude == pytest.approx(magnitude, rel=1e-6)


def test_sparsemixer_v2_draws_and_differentiates_as_its_released_code():
    """Given the same random numbers: the experts, their multipliers and the logits' gradient."""
    with np.load(FIXTURES / "sparsemixer.npz") as file:
        wanted = dict(file)
    threshold = float(wanted["threshold"])
    router = SparseMixerRouter(threshold, mask="released", expert_gradient="released")
    config = ExpertsConfig(num_experts=16, dim=48, router=router)
    draws = Draws(jnp.asarray(wanted["keys"])[None])
    with jax.enable_x64(True):
        cotangent = jnp.asarray(wanted["cotangent"])

        @jax.jit
        @jax.grad
        def gradient(z):
            return (sparsemixer(z, draws, config).gates[0] * cotangent).sum()

        z = jnp.asarray(wanted["z"])[None]
        ours = jax.jit(lambda z: sparsemixer(z, draws, config))(z)
        np.testing.assert_array_equal(ours.index[0], wanted["index"])
        # It has 0.3333 for a third.
        np.testing.assert_allclose(ours.gates[0], wanted["gates"], rtol=2e-4)
        np.testing.assert_allclose(gradient(z)[0], wanted["gradient"], atol=1e-12)
    assert (np.asarray(ours.gates) < 0.99).mean() > 0.1
    assert len({*map(tuple, wanted["index"].tolist())}) > 90
