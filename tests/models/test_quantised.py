"""Weights in 8 and 4 bits: what they round to, what they cost, and that a model runs on them."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import config, tree
from jaxscale.models.config import ExpertsConfig, ModelConfig
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, init_params, parameter_table
from jaxscale.models.quantised import QuantisedConfig, dequantised, num_bytes, quantised
from jaxscale.ops.precision import Policy
from jaxscale.ops.quantised import QuantisedTable, quantise
from jaxscale.run.run import Run
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError

SIZES = dict(vocab_size=31, num_layers=2, model_dim=16, max_length=32, ffn_dim=24)
DENSE = from_flat(num_heads=4, num_kv_heads=2, head_dim=8, **SIZES)
LAYER = dataclasses.replace(DENSE.pattern[0], feed_forward=ExpertsConfig(num_experts=4, dim=12))
MODELS = {
    "dense": DENSE,
    "mixture": dataclasses.replace(DENSE, pattern=(LAYER,)),
    "tied": dataclasses.replace(DENSE, is_tied=True),
}
PHI3 = Path(__file__).parents[2] / "experiments/configs/papers/phi3_mini.gin"


@functools.cache
def params(name):
    model = dataclasses.replace(MODELS[name], init_std=0.3)
    return init_params(parameter_table(model), jax.random.key(0), "float32")


def decoder(name, is_scanned=True):
    execution = ExecutionConfig(remat="none", is_scanned=is_scanned)
    return Decoder(MODELS[name], policy=Policy(compute="float32"), execution=execution)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_is_rounded_to_multiples_of_its_own_scale(bits):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, 4, 96, 5)).astype(
        np.float32
    )  # a stack of three, two dims of inputs
    matrix[:, 2] *= 100  # in the second group of 128 inputs
    matrix[:, 3] = 0
    found = quantise(jnp.asarray(matrix), 1, 2, bits)
    got = np.asarray(found.whole("float32")).reshape(3, 384, 5)
    groups = matrix.reshape(3, 3, 128, 5)
    scale = np.abs(groups).max(2, keepdims=True) / (2 ** (bits - 1) - 1)
    assert (np.abs(got.reshape(groups.shape) - groups) <= scale / 2 * 1.0001).all()
    np.testing.assert_array_equal(got[:, 288:], 0)
    assert found.words.nbytes == 3 * 384 * 64 * bits // 8  # 5 outputs are padded to 64


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_fit_the_scale_that_is_kept(bits):
    """In bfloat16 it is rounded, and the largest integers would be off by a quarter of a step."""
    matrix = np.random.default_rng(0).normal(size=(128, 64)).astype(jnp.bfloat16)
    found = quantise(jnp.asarray(matrix), 0, 1, bits)
    got, scales = found.integers()
    wide = matrix.astype(np.float32)
    error = np.abs(np.asarray(got, np.float32) * scales.astype("float32") - wide)
    assert (error <= scales.astype("float32") / 2 * 1.0001).all()


def test_rows_of_a_table_are_those_of_the_whole():
    """Of tokens beyond the first unit of 64, with more inputs than a group has."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(150, 200)), jnp.float32)
    small = QuantisedTable(quantise(table.T, 0, 1, 8))
    tokens = jnp.asarray([[0, 63, 64], [149, 128, 7]])
    np.testing.assert_allclose(small[tokens], small.whole("float32")[tokens], rtol=1e-6)
    np.testing.assert_allclose(small[tokens], table[tokens], atol=0.02)


def test_each_expert_s_matrix_has_scales_of_its_own():
    small = quantised(params("mixture"), parameter_table(MODELS["mixture"]), CONFIGS["mixture"])
    experts = small["layers"]["0"]["moe"]["experts"]
    for name, shape in (("gate", (16, 12)), ("up", (16, 12)), ("down", (12, 16))):
        assert (experts[name].shape, experts[name].num_inputs) == (shape, 1)
        assert experts[name].scales.shape[:2] == (2, 4)


CONFIGS = {
    "dense": QuantisedConfig(4),
    "mixture": QuantisedConfig(4, embedding_bits=8),
    "tied": QuantisedConfig(8, embedding_bits=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_integers_is_the_model_on_what_they_stand_for(name):
    small = quantised(params(name), parameter_table(MODELS[name]), CONFIGS[name])
    whole = dequantised(small, "float32")
    changed = {path for path, leaf in tree.flatten(whole).items() if is_changed(name, path, leaf)}
    roles = {
        path: entry.role for path, entry in tree.flatten(parameter_table(MODELS[name])).items()
    }
    tables = ("embedding", "unembedding") if CONFIGS[name].embedding_bits else ()
    assert changed == {path for path in roles if roles[path] in ("matrix", "expert", *tables)}
    tokens = np.random.default_rng(0).integers(0, 31, (2, 12))
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(12), (2, 12))}
    run = jax.jit(lambda params: decoder(name).logits(params, batch)[0])
    np.testing.assert_allclose(run(small), run(whole), atol=1e-5)


def is_changed(name, path, leaf):
    return not np.array_equal(leaf, tree.flatten(params(name))[path])


@pytest.mark.parametrize("is_scanned", [True, False])
def test_decoding_on_integers(is_scanned):
    small = quantised(params("dense"), parameter_table(DENSE), QuantisedConfig(8))

    def greedy(params):
        return generate_tokens(
            decoder("dense", is_scanned),
            params,
            [[1, 2, 3]],
            sampling=SamplingConfig(temperature=0.0),
            max_new_tokens=5,
        )

    assert greedy(small) == greedy(dequantised(small, "float32"))


@pytest.mark.parametrize(("bits", "of_tables", "gigabytes"), [(4, None, 2.28), (4, 8, 2.08)])
def test_the_bytes_of_phi3_mini(bits, of_tables, gigabytes):
    """With embedding and unembedding in bfloat16, or in 8 bits."""

    def the_model(*, run: Run) -> ModelConfig:
        return run.model

    table = parameter_table(config.run(the_model, [PHI3]))
    quantise_all = functools.partial(
        quantised, table=table, config=QuantisedConfig(bits, of_tables)
    )
    shapes = jax.eval_shape(quantise_all, abstract_params(table, "bfloat16"))
    assert num_bytes(shapes) <= gigabytes * 1e9


def test_other_bits_are_refused():
    with pytest.raises(InputError, match=r"QuantisedConfig\.bits: given 3, expected one of 8, 4"):
        QuantisedConfig(3)
