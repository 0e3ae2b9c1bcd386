"""An engine over a tensor group draws what one device draws."""

import dataclasses
import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.decoder import Decoder
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.backends import Operations
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_serving_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.parallel.comparison import dense, make_params, mixture

GREEDY = SamplingConfig(temperature=0)
SMALL = EngineConfig(token_budget=8, max_sequences=4, block_size=4, max_prompts=3, num_blocks=24)
POLICY = Policy(compute="float32")
MODELS = {"dense": dense(num_dense_prefix=1, num_layers=3), "mixture": mixture()}
PROMPTS = [[7, 3, 9, 37, 1], [5], [2, 2, 8, 40, 11, 3, 3, 3, 6]]
LONG = pytest.mark.long


@functools.cache
def params_of(name):
    return jax.tree.map(lambda leaf: leaf.astype("float32"), make_params(MODELS[name]))


@functools.cache
def engine(name, tensor):
    return make(name, tensor)


def make(name, tensor, adapters=MappingProxyType({}), **changes):
    model, config = MODELS[name], dataclasses.replace(SMALL, **changes)
    if tensor == 1:
        decoder = Decoder(model, Operations(), POLICY)
        return Engine(decoder, params_of(name), config=config)
    mesh = MeshConfig(tensor=tensor)
    specs = make_specs(parameter_table(model), mesh)
    devices = make_mesh(mesh, jax.devices()[:tensor])
    operations = make_serving_operations(mesh, specs, attention=kv_cache.attend)
    region = Region(devices, specs, operations)
    decoder = Decoder(model, operations, POLICY)
    return Engine(decoder, params_of(name), config=config, region=region, adapters=adapters)


def draw(engine, sampling):
    config = RequestConfig(sampling, max_new_tokens=5)
    return [each.tokens for (each,) in engine.generate(PROMPTS, config)]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        pytest.param("dense", 2, id="2 kv heads on 2 members"),
        pytest.param("dense", 4, id="2 kv heads on 4 members", marks=LONG),
        pytest.param("mixture", 2, id="experts", marks=LONG),
    ],
)
def test_a_tensor_group_draws_what_one_device_draws(name, tensor):
    for sampling in (GREEDY, SamplingConfig(seed=5)):
        assert draw(engine(name, tensor), sampling) == draw(engine(name, 1), sampling)


def test_each_member_has_the_pages_of_its_own_heads():
    caches = engine("dense", 2)._runner._caches
    for pages in jax.tree.leaves(caches):
        assert pages.shape[2] == 2
        assert pages.addressable_shards[0].data.shape[2] == 1


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_no_member_makes_the_pages_of_others(dtype):
    """Pages take what memory is left: made on one device first, they do not fit there."""
    placement = engine("dense", 2)._runner._placement
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        caches = placement.empty_caches(3, 4, dtype)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(caches))
    assert not any(leaf.is_fully_replicated for leaf in jax.tree.leaves(caches))


@pytest.mark.long
def test_prefixes_of_a_group_come_back_from_the_hosts_memory():
    spread = make("dense", 2, num_blocks=8, max_sequences=2, host_bytes=2**20)
    config = RequestConfig(GREEDY, max_new_tokens=4)
    prompts = [[number] * 9 for number in range(6)]
    first = [one.tokens for (one,) in spread.generate(prompts, config)]
    assert spread.figures().num_spilled > 0
    again = spread.generate(prompts, config)
    assert [(one.tokens, one.num_cached) for (one,) in again] == [(each, 8) for each in first]
    for pages in jax.tree.leaves(spread._runner._caches):
        assert pages.addressable_shards[0].data.shape[2] == 1


def test_a_group_has_no_adapters_by_request():
    with pytest.raises(InputError, match=r"adapters: given \['sql'\], expected none with a tensor"):
        make("dense", 2, adapters={"sql": None})


def drawn_with_head(rows):
    """The tokens that a group of two draws with a head of zeros but for rows, by token."""
    params = params_of("dense")
    head = np.zeros_like(params["head"]["weights"])
    for token, row in rows.items():
        head[token] = row
    changed = params | {"head": params["head"] | {"weights": jnp.asarray(head)}}
    spread = engine("dense", 2)
    spread.swap(changed)
    try:
        return {token for tokens in draw(spread, GREEDY) for token in tokens}
    finally:
        spread.swap(params)


def test_among_equal_maxima_on_several_members_the_lowest_token_is_drawn():
    """Tokens of the first member and of the last have equal rows in the head."""
    row = np.asarray(params_of("dense")["head"]["weights"])[9]
    drawn = drawn_with_head({9: row, 50: row, 8: -row, 51: -row})
    assert drawn
    assert drawn <= {8, 9}


@pytest.mark.parametrize("pair", [(8, 9), (50, 51)], ids=["first member", "last member"])
def test_a_maximum_is_drawn_on_whichever_member_it_is(pair):
    row = np.asarray(params_of("dense")["head"]["weights"])[9]
    drawn = drawn_with_head(dict(zip(pair, (row, -row), strict=True)))
    assert drawn
    assert drawn <= set(pair)
