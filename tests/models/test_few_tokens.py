"""Layers of a few tokens in few bits are the same layers: by the reference of the kernel."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.config import LongRopeScaling, RotaryConfig
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.few_tokens import FewTokens, fits, fused
from jaxscale.models.layers import Layer
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.models.quantised import QuantisedConfig, quantised
from jaxscale.ops.attention import AttentionContext

SIZES = dict(vocab_size=31, num_layers=1, model_dim=128, max_length=32, ffn_dim=256)
HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=32)
PLAIN = from_flat(**SIZES, **HEADS)


def with_parts(norm=PLAIN.norm, attention=None, feed_forward=None, **layer_parts):
    """The plain model, in which parts of its layer are others."""
    layer = PLAIN.pattern[0]
    layer = dataclasses.replace(
        layer,
        attention=dataclasses.replace(layer.attention, **attention or {}),
        feed_forward=dataclasses.replace(layer.feed_forward, **feed_forward or {}),
        **layer_parts,
    )
    return dataclasses.replace(PLAIN, pattern=(layer,), norm=norm)


LONG = LongRopeScaling((1.0,) * 16, 1.0, (4.0,) * 16, 1.3, original_length=2)
MODELS = {
    "plain": PLAIN,
    "norm of queries and keys": from_flat(**SIZES, **HEADS, use_qk_norm=True),
    "biases, as Qwen2 has": with_parts(attention=dict(biases=("q", "k", "v"))),
    "norms around 1, as Gemma has": with_parts(
        dataclasses.replace(PLAIN.norm, epsilon=0.1, scale_offset=1.0)
    ),
    "LongRoPE beyond its original length": with_parts(
        attention=dict(rotary=RotaryConfig(scaling=LONG))
    ),
}
OTHERS = {
    "layernorm": from_flat(**SIZES, **HEADS, norm="layernorm"),
    "not gated": from_flat(**SIZES, **HEADS, activation="gelu"),
    "another gate": from_flat(**SIZES, **HEADS, activation="geglu"),
    "a bias of the output": with_parts(attention=dict(biases=("o",))),
    "a norm of all heads": with_parts(attention=dict(qk_norm="all")),
    "biases of the feed-forward": with_parts(feed_forward=dict(use_bias=True)),
    "norms after": with_parts(norm_position="both"),
    "side by side": with_parts(is_parallel=True),
    "inputs that are no whole units": from_flat(**SIZES | {"model_dim": 64}, **HEADS),
}


def layer_of(model):
    """With norms and biases that are not those of a new model, each another."""
    table = parameter_table(model)
    params = init_params(table, jax.random.key(0), "float32")
    rng = np.random.default_rng(1)

    def drawn(path, leaf):
        is_vector = path.endswith(("scale", "bias"))
        return leaf + rng.normal(size=leaf.shape).astype("float32") / 2 if is_vector else 3 * leaf

    params = quantised(tree.map_with_path(drawn, params), table, QuantisedConfig(4))
    params = jax.tree.map(lambda leaf: leaf[0], params["layers"]["0"])
    return Layer(params, model.pattern[0], model.norm, Decoder(model).operations)


@pytest.mark.parametrize("name", MODELS)
def test_the_layer_is_the_same(name):
    layer = layer_of(MODELS[name])
    assert fits(layer)
    x = np.random.default_rng(0).normal(size=(2, 3, 128)).astype(np.float32)
    positions, lengths = np.broadcast_to(np.arange(3), (2, 3)), np.full((2, 3), 3)
    context = AttentionContext(positions=positions, lengths=lengths)
    together = FewTokens(**vars(layer), implementation="reference")
    got, wanted = (
        jax.jit(lambda x, each=each: each(x, context)[0])(x) for each in (together, layer)
    )
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_left_as_they_are(name):
    layer = layer_of(OTHERS[name])
    assert not fits(layer) and fused(layer, np.zeros((1, 1, 128), "bfloat16")) is layer
