"""Layers of a few tokens in few bits are the same layers: by the reference of the kernel."""

import jax
import numpy as np
import pytest

from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.few_tokens import FewTokens, fits, fused
from jaxscale.models.layers import Layer
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.models.quantised import QuantisedConfig, quantised
from jaxscale.ops.attention import AttentionContext

SIZES = dict(vocab_size=31, num_layers=1, model_dim=128, max_length=32, ffn_dim=256)
HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=32)
MODELS = {
    "plain": from_flat(**SIZES, **HEADS),
    "norm of queries and keys": from_flat(**SIZES, **HEADS, use_qk_norm=True),
}
OTHERS = {
    "layernorm": from_flat(**SIZES, **HEADS, norm="layernorm"),
    "not gated": from_flat(**SIZES, **HEADS, activation="gelu"),
    "biases": from_flat(**SIZES, **HEADS, use_bias=True),
    "inputs that are no whole units": from_flat(**SIZES | {"model_dim": 64}, **HEADS),
}


def layer_of(model):
    table = parameter_table(model)
    params = init_params(table, jax.random.key(0), "float32")
    params = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, params)
    params = quantised(params, table, QuantisedConfig(4))["layers"]["0"]
    params = jax.tree.map(lambda leaf: leaf[0], params)
    return Layer(params, model.pattern[0], model.norm, Decoder(model).operations)


@pytest.mark.parametrize("name", MODELS)
def test_the_layer_is_the_same(name):
    layer = layer_of(MODELS[name])
    assert fits(layer)
    x = np.random.default_rng(0).normal(size=(2, 3, 128)).astype(np.float32)
    context = AttentionContext(positions=np.broadcast_to(np.arange(3), (2, 3)))
    together = FewTokens(**vars(layer), implementation="reference")
    got, wanted = (
        jax.jit(lambda x, each=each: each(x, context)[0])(x) for each in (together, layer)
    )
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_left_as_they_are(name):
    layer = layer_of(OTHERS[name])
    assert not fits(layer) and fused(layer, np.zeros((1, 1, 128), "bfloat16")) is layer
