"""Decoding on a mesh: logits, caches and tokens are those of one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.backends import Operations
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import DATA, EXPERT, TENSOR, MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_serving_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.serve.caches import empty_caches
from jaxscale.serve.decoding import (
    PADDING,
    advance,
    generate_tokens,
    with_attention,
)
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.parallel.comparison import dense, make_params, mixture

ROWS = (DATA, EXPERT)
LENGTHS = (5, 3, 4, 1)  # of the prompts, padded on the left
NUM_STEPS = 3
WIDTH = max(LENGTHS)
CAPACITY = WIDTH + NUM_STEPS
POLICY = Policy(compute="float32")
EXECUTION = ExecutionConfig(remat="none")
# With a layer before the stack, whose cache has no leading dim of periods.
MODELS = {"dense": dense(num_dense_prefix=1, num_layers=3), "mixture": mixture(use_head_bias=True)}


@functools.cache
def params_of(model):
    return jax.tree.map(lambda leaf: leaf.astype("float32"), make_params(model))


def on_mesh(model, **sizes):
    """(region, decoder) of a mesh."""
    config = MeshConfig(**sizes)
    specs = make_specs(parameter_table(model), config)
    operations = make_serving_operations(config, specs, attention=kv_cache.attend)
    mesh = make_mesh(config, jax.devices()[: math.prod(config.sizes)])
    return Region(mesh, specs, operations), Decoder(model, operations, POLICY, EXECUTION)


def inputs():
    """Tokens and positions [B, CAPACITY] of padded prompts and of what follows them."""
    tokens = np.random.default_rng(0).integers(0, 64, (len(LENGTHS), CAPACITY))
    starts = WIDTH - np.array(LENGTHS)[:, None]
    positions = np.arange(CAPACITY) - starts
    return tokens, np.where(positions < 0, PADDING, positions)


def prefill(decoder, tensor, params, tokens, positions):
    """Logits of the prompts' last tokens and the caches, which are made where they are filled."""
    caches = empty_caches(decoder, len(tokens), CAPACITY, tensor)
    first_pass = with_attention(decoder, kv_cache.prefill)
    return advance(first_pass, params, tokens, positions, caches)


def step(decoder, params, tokens, positions, caches):
    return advance(with_attention(decoder, kv_cache.attend), params, tokens, positions, caches)


def decode(start, go_on, params):
    """Logits [steps, B, V] and the last caches, by a prefill and one program for every step."""
    tokens, positions = inputs()
    logits, caches = start(params, tokens[:, :WIDTH], positions[:, :WIDTH])
    found = [logits]
    for place in range(WIDTH, CAPACITY):
        here = slice(place, place + 1)
        logits, caches = go_on(params, tokens[:, here], positions[:, here], caches)
        found.append(logits)
    return jnp.stack(found), caches


@functools.cache
def on_one_device(model):
    decoder = Decoder(model, Operations(), POLICY, EXECUTION)
    start = jax.jit(functools.partial(prefill, decoder, 1))
    go_on = jax.jit(functools.partial(step, decoder))
    return decode(start, go_on, params_of(model))


def cache_specs(decoder):
    """Rows over data and expert, and kv heads over tensor."""
    shapes = jax.eval_shape(lambda: empty_caches(decoder, len(LENGTHS), CAPACITY))

    def one(path, leaf):
        stacked = (None,) if path[0].key == "layers" else ()
        by_name = {"k": (ROWS, TENSOR), "v": (ROWS, TENSOR), "length": ()}
        return PartitionSpec(*stacked, *by_name.get(path[-1].name, (ROWS,)))

    return jax.tree_util.tree_map_with_path(one, shapes)


def spread(model, **sizes):
    """`decode` over a mesh, with caches that leave the region and enter it again."""
    region, decoder = on_mesh(model, **sizes)
    rows, caches = PartitionSpec(ROWS), cache_specs(decoder)
    start = region.forward(
        functools.partial(prefill, decoder, sizes.get("tensor", 1)),
        in_specs=(rows, rows),
        out_specs=(rows, caches),
    )
    go_on = region.forward(
        functools.partial(step, decoder),
        in_specs=(rows, rows, caches),
        out_specs=(rows, caches),
    )
    return decode(jax.jit(start), jax.jit(go_on, donate_argnums=3), params_of(model))


def assert_close(found, wanted):
    """Within 1e-5 of the largest."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


LONG = pytest.mark.long
CASES = [
    pytest.param("dense", dict(tensor=4), id="dense, 2 kv heads on 4 members"),
    pytest.param("dense", dict(data=2, tensor=2), id="dense, data 2 x tensor 2"),
    pytest.param("mixture", dict(expert=2), id="mixture, expert 2"),
    pytest.param("dense", dict(tensor=2), id="dense, tensor 2", marks=LONG),
    pytest.param("mixture", dict(tensor=2), id="mixture, tensor 2", marks=LONG),
    pytest.param("mixture", dict(tensor=4), id="mixture, tensor 4", marks=LONG),
    pytest.param("mixture", dict(data=2, tensor=2), id="mixture, data x tensor", marks=LONG),
    pytest.param("mixture", dict(expert=2, tensor=2), id="mixture, expert x tensor", marks=LONG),
    pytest.param(
        "mixture",
        dict(tensor=2, expert_axis="tensor"),
        id="mixture, experts on tensor members",
        marks=LONG,
    ),
    pytest.param("dense", dict(data=2, zero=3), id="dense, ZeRO 3", marks=LONG),
]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_logits_and_caches_are_those_of_one_device(name, sizes):
    model = MODELS[name]
    wanted_logits, wanted_caches = on_one_device(model)
    logits, caches = spread(model, **sizes)
    assert_close(logits, wanted_logits)
    tensor, num_kv_heads = sizes.get("tensor", 1), 2
    copies = max(tensor // num_kv_heads, 1)

    def compare(path, found, wanted):
        wanted = np.asarray(wanted)
        if path[-1].name in "kv":
            # [.., B, K, S, H]: several members have copies of one head.
            wanted = np.repeat(wanted, copies, axis=-3)
            assert_close(found, wanted)
            assert found.addressable_shards[0].data.shape[-3] == wanted.shape[-3] // tensor
        else:
            np.testing.assert_array_equal(found, wanted)

    jax.tree_util.tree_map_with_path(compare, caches, wanted_caches)


PROMPTS = [[7, 3, 9, 37, 1], [5], [2, 2, 8], [40, 11]]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mixture", dict(tensor=2)),
        pytest.param("dense", dict(tensor=4), marks=LONG),
        pytest.param("mixture", dict(expert=2), marks=LONG),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_one_device(name, sizes):
    model = MODELS[name]
    region, decoder = on_mesh(model, **sizes)
    generate = functools.partial(
        generate_tokens,
        params=params_of(model),
        prompts=PROMPTS,
        sampling=SamplingConfig(temperature=0),
        max_new_tokens=4,
    )
    alone = Decoder(model, Operations(), POLICY, EXECUTION)
    assert generate(decoder, region=region) == generate(alone)


@pytest.mark.parametrize("axis", ["pipeline", "sequence"])
def test_axes_without_decoding_are_refused(axis):
    config = MeshConfig(**{axis: 2})
    specs = make_specs(parameter_table(MODELS["dense"]), config)
    with pytest.raises(InputError, match=f"MeshConfig.{axis}: given 2, expected 1 for decoding"):
        make_serving_operations(config, specs, attention=kv_cache.attend)
