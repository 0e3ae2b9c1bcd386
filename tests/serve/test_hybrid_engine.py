"""Texts that a model in training writes on all devices are those that it writes on one."""

import dataclasses

import jax
import pytest

from jaxscale import tree
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.rotary import LongRopeScaling, RotaryConfig
from jaxscale.serve.decoding import Loop, compiled
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.parallel.comparison import dense, mixture
from tests.serve.engines import FLOAT32, one_device, training

GREEDY = SamplingConfig(temperature=0.0)
DRAWN = SamplingConfig(seed=5)
PROMPTS = [[3, 9, 4], [7], [1, 2, 3, 4, 5], [60, 2], [8, 8, 8, 8]]  # no number of groups divides 5
SCALING = LongRopeScaling((1.0, 1.1, 1.2, 1.3), 1.1, (2.0, 3.0, 4.0, 5.0), 1.3, 6)


def with_two_lengths():
    """Texts of more than 6 tokens have other rotary positions, so that prompts are filled anew."""
    model = dense(num_layers=1)
    (layer,) = model.pattern
    attention = dataclasses.replace(layer.attention, rotary=RotaryConfig(scaling=SCALING))
    layer = dataclasses.replace(layer, attention=attention)
    return dataclasses.replace(model, pattern=(layer,))


MODELS = {"dense": dense(), "mixture": mixture(), "longrope": with_two_lengths()}


def spread_over(tensor, model, region):
    return HybridEngine(model, FLOAT32, region, tensor, "Samples.tensor")


def trained(model, region):
    """Parameters as a training on the region's mesh has them."""
    params = init_params(parameter_table(model), jax.random.key(2), "float32")
    stored = region.specs.layout.store(params, region.specs.dims)
    shardings = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(region.mesh, spec), region.specs.parameters
    )
    return jax.device_put(stored, shardings)


def written(engine, params, prompts=PROMPTS, **settings):
    settings = dict(sampling=GREEDY, max_new_tokens=6, eos_id=None) | settings
    return engine.write(engine.spread(params), prompts, **settings)


@pytest.mark.parametrize(
    ("name", "sizes", "tensor"),
    [
        ("dense", dict(data=4, zero=3), 1),
        ("dense", dict(data=2, tensor=4), 2),
        ("mixture", dict(data=2, expert=2, zero=3), 2),
        ("longrope", dict(data=4), 2),
        *[
            pytest.param(name, sizes, tensor, marks=pytest.mark.long)
            for name, sizes, tensor in (
                ("dense", dict(sequence=2, tensor=2), 4),  # of which two share a head of keys
                ("dense", dict(pipeline=2, data=2), 1),
                ("mixture", dict(pipeline=2, num_chunks=1, tensor=2), 4),
                ("mixture", dict(expert=4), 1),
            )
        ],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "sampling", [DRAWN, pytest.param(GREEDY, marks=pytest.mark.long)], ids=["drawn", "greedy"]
)
def test_texts_are_those_of_one_device(name, sizes, tensor, sampling):
    model = MODELS[name]
    region, alone = training(model, **sizes), one_device(model)
    engine = spread_over(tensor, model, region)
    found = written(engine, trained(model, region), sampling=sampling)
    wanted = written(alone, trained(model, training(model)), sampling=sampling)
    assert found == wanted
    assert all(len(tokens) == 6 for tokens in found)
    assert len(set(map(tuple, found))) == 5


@pytest.mark.parametrize("name", ["dense", "longrope"])
def test_a_text_that_ends_does_not_end_others(name):
    """The end token is the third of one text; of the others fewer may be left than groups."""
    model = MODELS[name]
    region = training(model, data=4)
    params = trained(model, region)
    engine = spread_over(1, model, region)
    whole = written(engine, params)
    end = whole[1][2]
    found = written(engine, params, eos_id=end)
    ends = [tokens.index(end) + 1 if end in tokens else len(tokens) for tokens in whole]
    assert found == [tokens[:size] for tokens, size in zip(whole, ends, strict=True)]
    assert ends[1] <= 3 and max(ends) == 6


def crossed(jaxpr):
    """The axes over which a traced program sums or gathers."""
    found = set()
    for equation in jaxpr.eqns:
        for name in ("axes", "axis_name"):
            axes = equation.params.get(name, ())
            axes = axes if isinstance(axes, tuple) else (axes,)
            found |= {axis for axis in axes if isinstance(axis, str)}
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found |= crossed(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_no_group_waits_for_another_while_it_writes(name):
    """So that one whose texts are short is done, and loops of other lengths do not lock."""
    engine = spread_over(2, MODELS[name], training(MODELS[name], data=4))
    params = jax.tree.map(jax.numpy.zeros_like, engine.abstract)

    def write(params):
        loop = Loop(engine.decoder, GREEDY, max_new_tokens=4, eos_id=None, num_tokens=None)
        rows = jax.numpy.zeros((4, 8), "int32")
        return compiled(loop, engine.region)(params, rows, rows, rows[:, 0], jax.random.key(0))

    assert crossed(jax.make_jaxpr(write)(params).jaxpr) == {"tensor"}


def test_the_copy_that_writes_is_spread_and_the_critic_stays_behind():
    model = MODELS["dense"]
    region = training(model, data=4)
    params = trained(model, region) | {"critic": {"embedding": jax.numpy.ones(4)}}
    spread = spread_over(2, model, region).spread(params)
    assert "critic" not in spread
    up = tree.flatten(spread)["layers/0/ffn/up"]
    assert up.sharding.shard_shape(up.shape)[-1] == up.shape[-1] // 2


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (3, "given 3, expected devices % tensor == 0, here 8 devices"),
        (8, r"given 8, expected a number by which the model can be divided \(MeshConfig.tensor: "),
    ],
)
def test_a_number_of_devices_that_does_not_divide_is_refused_by_its_name(tensor, message):
    region = training(MODELS["dense"], data=8)
    with pytest.raises(InputError, match=f"Samples.tensor: {message}"):
        spread_over(tensor, MODELS["dense"], region)
