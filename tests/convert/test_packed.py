"""Models in few bits, written as folders of compressed-tensors and read with the same integers."""

import functools
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxscale import tree
from jaxscale.convert.families import BY_MODEL_TYPE
from jaxscale.convert.folder import CONFIG, open_folder, read_config, write_folder
from jaxscale.convert.packed import packed_tensors
from jaxscale.models.parameters import abstract_params, init_params, parameter_table
from jaxscale.models.quantised import QuantisedConfig, dequantised, quantised
from jaxscale.types import InputError
from tests.convert.test_families import FIXTURES, placed
from tests.convert.test_phi3_small import TINY
from tests.kernels.interpretation import long_but

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Fused projections, experts, a tied embedding, interleaved projections with biases.
FAMILIES = {
    "phi3": QuantisedConfig(4, embedding_bits=8),
    "mixtral": QuantisedConfig(8),
    "qwen3": QuantisedConfig(4, embedding_bits=8),
    "phi3small": QuantisedConfig(4, embedding_bits=8),
}


@functools.cache
def small(name):
    """(a tiny model of a family, its parameters in few bits)."""
    values = TINY if name == "phi3small" else json.loads((FIXTURES / name / CONFIG).read_text())
    if name == "phi3":  # more inputs than a group has
        values |= {"hidden_size": 160, "intermediate_size": 136}
    names = () if values.get("tie_word_embeddings", True) else ("lm_head.weight",)
    model = read_config(BY_MODEL_TYPE[name], values, CONFIG, names)
    table = parameter_table(model)
    params = init_params(table, jax.random.key(0), "bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)  # as what is written
    return model, quantised(params, table, FAMILIES[name])


def write(name, path):
    model, params = small(name)
    write_folder(path, model, params, dtype=BFLOAT16, family=name)
    return open_folder(path)


@pytest.mark.parametrize("name", long_but(FAMILIES, ("phi3",)))
def test_a_folder_in_few_bits_has_the_same_integers_again(name, tmp_path):
    folder, (model, params) = write(name, tmp_path), small(name)
    assert folder.config == model and folder.is_packed
    stored = placed(model, "bfloat16")
    got, wanted = (tree.flatten(each) for each in (folder.packed_params(stored), params))
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(leaf), path)
    # Read as whole matrices it is what the integers stand for.
    whole = tree.flatten(folder.params(stored))
    for path, leaf in tree.flatten(dequantised(params, "bfloat16")).items():
        np.testing.assert_array_equal(np.asarray(whole[path]), np.asarray(leaf), path)


def test_what_is_written_says_the_bits_of_each_module(tmp_path):
    """Others read the words by it."""
    write("phi3", tmp_path)
    groups = json.loads((tmp_path / CONFIG).read_text())["quantization_config"]["config_groups"]
    found = {each["weights"]["num_bits"]: each["targets"] for each in groups.values()}
    assert set(found) == {4, 8}
    for bits, module in (
        (8, "lm_head"),
        (8, "model.embed_tokens"),
        (4, "model.layers.1.mlp.down_proj"),
    ):
        assert [pattern for pattern in found[bits] if re.fullmatch(pattern[3:], module)]
        assert not [each for each in found[12 - bits] if re.fullmatch(each[3:], module)]


def test_the_file_of_phi3_mini(tmp_path):
    """At most 2.2 GB with embedding and unembedding in 8 bits, 2.28 with both in bfloat16."""
    values = json.loads((FIXTURES / "full_size.json").read_text())["Phi-3-mini 4K"]["config"]
    family = BY_MODEL_TYPE["phi3"]
    model = read_config(family, values, CONFIG, ("lm_head.weight",))
    table = parameter_table(model)
    for of_tables, gigabytes in ((8, 2.07), (None, 2.265)):
        config = QuantisedConfig(4, of_tables)
        quantise_all = functools.partial(quantised, table=table, config=config)
        shapes = jax.eval_shape(quantise_all, abstract_params(table, "bfloat16"))
        tensors, _ = packed_tensors(model, family.layout, shapes, dtype=BFLOAT16)
        assert sum(tensor.num_bytes for tensor in tensors) == pytest.approx(
            gigabytes * 1e9, rel=2e-3
        )


def test_matrices_of_another_order_are_refused(tmp_path):
    folder = open_folder(FIXTURES / "gpt2")
    params = folder.params(placed(folder.config, "bfloat16"))
    params = quantised(params, parameter_table(folder.config), QuantisedConfig(4))
    with pytest.raises(InputError, match=r"quantisation: given '\[in, out\]'"):
        write_folder(tmp_path, folder.config, params, dtype=BFLOAT16)


def test_words_of_no_number_of_bits_are_refused(tmp_path):
    folder = write("phi3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_packed"
    tensors[name] = tensors[name][:, :-1].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="4 or 8 bits"):
        open_folder(folder.path)
