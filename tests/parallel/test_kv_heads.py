"""More tensor members than kv heads, and norms over all heads, some of which other devices have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.models.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
)
from jaxscale.models.layers import Layer
from jaxscale.ops.backends import Operations
from jaxscale.ops.collectives import Collectives
from jaxscale.parallel import tensor
from jaxscale.parallel.mesh import TENSOR, MeshConfig, make_mesh
from tests.parallel.comparison import on_mesh, relative_errors, single_device

LIMIT = 1e-9  # of each error of `relative_errors`, and of the loss
RMS_NORM = NormConfig("rmsnorm")
LAYER_NORM = NormConfig("layernorm", use_bias=True)
BIASES = ("q", "k", "v", "o")


def layer(num_kv_heads, biases=(), qk_norm=None):
    attention = AttentionConfig(
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        biases=biases,
        qk_norm=qk_norm,
    )
    return LayerConfig(attention, FeedForwardConfig(32))


def model(*pattern, norm=RMS_NORM):
    """One layer of each kind."""
    return ModelConfig(
        vocab_size=64,
        num_layers=len(pattern),
        model_dim=16,
        max_length=16,
        pattern=pattern,
        norm=norm,
    )


# The two kinds of norms in one program, one with biases and one without.
EVERYTHING = model(layer(2, BIASES, "head"), layer(2, (), "all"), norm=LAYER_NORM)
CASES = [
    pytest.param(
        model(layer(1, ("k", "v"), "all")), dict(tensor=2, zero=0), id="1 head on 2 members"
    ),
]
LONG = [
    (model(layer(num_kv_heads, biases, qk_norm), norm=norm), sizes)
    for num_kv_heads, sizes in [(2, dict(tensor=4)), (1, dict(tensor=2)), (2, dict(tensor=2))]
    for biases in [(), ("k", "v")]
    for qk_norm, norm in [(None, RMS_NORM), ("head", RMS_NORM), ("all", LAYER_NORM)]
]
LONG.append((EVERYTHING, dict(data=2, tensor=4, zero=3)))
# With other axes: each has its own exchange of heads, tokens or layers.
LONG += [
    (EVERYTHING, dict(tensor=4, sequence=2)),
    (EVERYTHING, dict(tensor=4, data=2, zero=3, num_microbatches=2)),
    (model(layer(1, BIASES, "all")), dict(tensor=2, sequence=2, ring=2)),
    (model(layer(1, BIASES, "all")), dict(tensor=2, sequence=2, zero=3)),
    (
        dataclasses.replace(model(layer(1, BIASES, "all")), num_layers=2),
        dict(tensor=2, pipeline=2, num_microbatches=2),
    ),
]


@pytest.mark.parametrize(
    ("config", "sizes"),
    CASES + [pytest.param(*case, marks=pytest.mark.long) for case in LONG],
)
def test_every_member_has_the_kv_heads_that_its_queries_read(config, sizes):
    """Loss and every gradient are those of one device; a head's is the sum over its members."""
    with jax.enable_x64(True):
        wanted_loss, wanted = single_device(config)
        (loss, _, _), gradients = on_mesh(config, **sizes)
        np.testing.assert_allclose(loss, wanted_loss, rtol=LIMIT)
        errors = relative_errors(gradients, wanted)
    assert all(error <= LIMIT for error in errors.values()), errors


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_a_norm_over_all_heads_is_that_of_the_whole_token(num_kv_heads):
    """On two members: the mean of squares is over the heads of both, whichever has them."""
    kind = dataclasses.replace(layer(num_kv_heads, (), "all").attention, rotary=None)
    rng = np.random.default_rng(0)
    h = rng.normal(size=(2, 3, 16)).astype("float32")
    shapes = dict(q=(16, 4, 8), k=(16, num_kv_heads, 8), v=(16, num_kv_heads, 8))
    params = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    for name in "qk":
        scale = rng.normal(1, 0.1, shapes[name][1:])
        params[f"{name}_norm"] = {"scale": scale.astype("float32")}
    collectives = Collectives(kv_heads=tensor.kv_heads, sum_over_heads=tensor.sum_over_heads)

    def local(params, h):
        config = LayerConfig(kind, FeedForwardConfig(32))
        operations = Operations(collectives=collectives)
        bound = Layer({"attention": params}, config, RMS_NORM, operations)
        q, k, _ = bound.qkv(h, jnp.zeros(h.shape[:2], int))
        return q, k

    heads, whole = P(None, TENSOR), P()
    of_kv = heads if num_kv_heads == 2 else whole
    scale_of_kv = P(TENSOR) if num_kv_heads == 2 else whole
    specs = dict(
        q=heads,
        k=of_kv,
        v=of_kv,
        q_norm={"scale": P(TENSOR)},
        k_norm={"scale": scale_of_kv},
    )
    by_head = P(None, None, TENSOR)
    mapped = jax.shard_map(
        local,
        mesh=make_mesh(MeshConfig(tensor=2), jax.devices()[:2]),
        in_specs=(specs, whole),
        out_specs=(by_head, by_head),
        check_vma=False,
    )
    q, k = jax.jit(mapped)(params, h)
    np.testing.assert_allclose(q, normalised(params, "q", h), rtol=1e-5, atol=1e-6)
    # Each member has the head that its queries read.
    wanted = np.broadcast_to(normalised(params, "k", h), k.shape)
    np.testing.assert_allclose(k, wanted, rtol=1e-5, atol=1e-6)


def normalised(params, name, h):
    """The projection of each token divided by the root mean square of all its heads' elements."""
    x = np.einsum("btd,dnh->btnh", h, params[name])
    tokens = x.reshape(*x.shape[:2], -1)
    mean_square = (tokens**2).mean(-1)[..., None, None]
    return x / np.sqrt(mean_square + RMS_NORM.epsilon) * params[f"{name}_norm"]["scale"]
