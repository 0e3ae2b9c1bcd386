"""Low-rank adapters: new ones change nothing, merged ones compute the same, only they train."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.config import LoraConfig
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.lora import (
    TRAINABLE,
    Adapters,
    factor_table,
    merged,
    new_adapters,
    side_by_side,
    with_adapters,
    without_adapters,
)
from jaxscale.models.parameters import count_parameters, init_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError

LORA = LoraConfig(rank=3, alpha=6.0, targets=("q", "v", "o", "gate", "down"))
SIZES = dict(vocab_size=31, num_layers=2, model_dim=16, max_length=32, ffn_dim=24)
BASE = from_flat(num_heads=4, num_kv_heads=2, head_dim=8, num_dense_prefix=0, **SIZES)
MODEL = dataclasses.replace(BASE, lora=LORA)
KEY = jax.random.key(0)


@functools.cache
def base_params():
    return init_params(parameter_table(BASE), KEY, "float32")


def trained():
    """The parameters with adapters whose product is not 0."""
    params = with_adapters(base_params(), MODEL, new_adapters(MODEL, KEY, "float32"))

    def one(path, leaf):
        return leaf + 0.1 if path.endswith("_lora/b") else leaf

    return tree.map_with_path(one, params)


def decoder(model, is_scanned=True):
    execution = ExecutionConfig(remat="none", is_scanned=is_scanned)
    return Decoder(model, policy=Policy(compute="float32"), execution=execution)


@functools.cache
def logits_of(model):
    tokens = np.random.default_rng(0).integers(0, 31, (2, 12))
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(12), (2, 12))}
    return jax.jit(lambda params: decoder(model).logits(params, batch)[0])


def test_new_adapters_change_nothing():
    params = with_adapters(base_params(), MODEL, new_adapters(MODEL, KEY, "float32"))
    assert jax.tree.structure(params) == jax.tree.structure(parameter_table(MODEL))
    got, wanted = logits_of(MODEL)(params), logits_of(BASE)(base_params())
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_merged_equals_unmerged_and_the_formula():
    params = trained()
    plain = merged(params, LORA)
    assert jax.tree.structure(plain) == jax.tree.structure(base_params())
    got, wanted = logits_of(MODEL)(params), logits_of(BASE)(plain)
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    assert np.abs(got - logits_of(BASE)(base_params())).max() > 0.01
    attention, adapter = (params["layers"]["0"]["attention"][name] for name in ("o", "o_lora"))
    product = np.asarray(adapter["a"][1]).reshape(-1, 3) @ np.asarray(adapter["b"][1])
    np.testing.assert_allclose(
        plain["layers"]["0"]["attention"]["o"][1].reshape(-1, 16),
        np.asarray(attention[1]).reshape(-1, 16) + 2.0 * product,
        atol=1e-6,
    )


@pytest.mark.parametrize("is_scanned", [True, False])
def test_decoding_uses_the_adapters(is_scanned):
    def greedy(model, params):
        return generate_tokens(
            decoder(model, is_scanned),
            params,
            [[1, 2, 3]],
            sampling=SamplingConfig(temperature=0.0),
            max_new_tokens=5,
        )

    params = trained()
    assert greedy(MODEL, params) == greedy(without_adapters(MODEL), merged(params, LORA))


def test_the_pattern_of_trainable_parameters_is_the_adapters():
    is_trained = tree.flatten(tree.mask(parameter_table(MODEL), TRAINABLE))
    assert sum(is_trained.values()) == 2 * len(LORA.targets)
    extra = num_parameters(MODEL) - num_parameters(BASE)
    by_layer = 3 * ((16 + 32) * 2 + (16 + 16) + (16 + 24) * 2)
    assert extra == 2 * by_layer


def num_parameters(model):
    return count_parameters(parameter_table(model))[0]


def test_gradients_reach_both_factors():
    gradient = jax.jit(jax.grad(lambda params: (logits_of(MODEL)(params) ** 2).mean()))(trained())
    for path, leaf in tree.flatten(gradient).items():
        if "_lora/" in path:
            assert jnp.abs(leaf).max() > 0, path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "LoraConfig.rank"),
        ({"rank": 2, "targets": ("q", "router")}, "LoraConfig.targets: given 'router'"),
        ({"rank": 2, "targets": ()}, "at least one matrix"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**fields)


def test_each_token_may_have_an_adapter_of_its_own():
    """Of other ranks and targets, one a row or none; each as if it were alone."""
    others = LoraConfig(rank=2, alpha=5.0, targets=("o", "up"))
    given = []
    for lora in (LORA, others):
        config = dataclasses.replace(BASE, lora=lora)
        leaves = new_adapters(config, KEY, "float32")
        leaves = {path: leaf + 0.1 for path, leaf in leaves.items()}
        given.append(Adapters(lora, leaves))
    tokens = np.random.default_rng(0).integers(0, 31, (3, 12))
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(12), (3, 12))}
    rows = np.repeat(np.arange(3)[:, None], 12, 1)
    params = side_by_side(base_params(), given, "float32")
    found = decoder(BASE).logits(params, batch | {"adapters": factor_table(given)[rows]})[0]
    for row, each in enumerate([None, *given]):
        config = dataclasses.replace(BASE, lora=each and each.lora)
        alone = with_adapters(base_params(), config, each.leaves) if each else base_params()
        wanted = decoder(config).logits(alone, batch)[0][row]
        np.testing.assert_allclose(found[row], wanted, atol=2e-5)
