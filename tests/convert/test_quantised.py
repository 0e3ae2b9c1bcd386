"""AWQ, GPTQ and compressed-tensors, written here number by number as their formats say."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxscale import tree
from jaxscale.convert.folder import CONFIG, open_folder, write_folder
from jaxscale.types import InputError
from tests.convert.test_families import FIXTURES, placed

GROUP = 8
WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP,
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head"],
}
CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    "gptq_v2": {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": GROUP,
        "checkpoint_format": "gptq_v2",
    },
    "compressed": COMPRESSED,
    "compressed_in_order": COMPRESSED
    | {"config_groups": {"group_0": {"weights": WEIGHTS | {"actorder": "group"}}}},
    "compressed_by_channel": COMPRESSED
    | {"config_groups": {"group_0": {"weights": WEIGHTS | {"strategy": "channel"}}}},
}


def packed(integers, bits, places):
    """Rows of unsigned integers as rows of words; `places` of each of a word's, from its bit 0."""
    words = []
    for row in integers.tolist():
        for first in range(0, len(row), 32 // bits):
            word = 0
            for number, place in enumerate(places or range(32 // bits)):
                word |= row[first + place] << bits * number
            words.append(word)
    return np.array(words, np.uint32).view(np.int32).reshape(len(integers), -1)


def write_module(name, module, shape, rng):
    """(tensors of a module [out, in], the matrix that they stand for)."""
    outputs, inputs = shape
    bits = 8 if name == "gptq_v2" else 4
    size = inputs if name == "compressed_by_channel" else GROUP
    scales = rng.uniform(0.01, 0.1, (inputs // size, outputs)).astype(np.float16)
    integers = rng.integers(0, 2**bits, (inputs, outputs))
    groups = np.arange(inputs) // size
    if name.startswith("compressed"):
        is_in_order = name == "compressed_in_order"  # of activations
        groups = rng.permutation(groups).astype(np.int32) if is_in_order else groups
        matrix = (integers - 8) * scales[groups].astype(np.float32)
        tensors = {
            "weight_packed": packed(integers.T, bits, None),
            "weight_scale": np.ascontiguousarray(scales.T),
            "weight_shape": np.array([outputs, inputs]),
        } | ({"weight_g_idx": groups} if is_in_order else {})
        return {f"{module}.{last}": array for last, array in tensors.items()}, matrix.T
    zeros = rng.integers(1, 2**bits, scales.shape)
    if name == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": packed(integers, 4, order), "qzeros": packed(zeros, 4, order)}
    else:
        groups = rng.permutation(groups).astype(np.int32)
        stored = zeros - 1 if name == "gptq" else zeros
        tensors = {
            "qweight": np.ascontiguousarray(packed(integers.T, bits, None).T),
            "qzeros": packed(stored, bits, None),
            "g_idx": groups,
        }
    matrix = (integers - zeros[groups]) * scales[groups].astype(np.float32)
    tensors["scales"] = scales
    return {f"{module}.{last}": array for last, array in tensors.items()}, matrix.T


def write(name, path):
    """A folder whose projections are quantised, and the same with whole matrices."""
    rng = np.random.default_rng(0)
    tensors = load_file(FIXTURES / "llama" / "model.safetensors")
    whole = {key: array.astype(np.float16) for key, array in tensors.items()}
    quantised = dict(whole)
    for key in [key for key in whole if key.endswith("_proj.weight")]:
        module = key.removesuffix(".weight")
        more, matrix = write_module(name, module, whole[key].shape, rng)
        del quantised[key]
        quantised |= more
        whole[key] = np.ascontiguousarray(matrix, np.float16)
    config = json.loads((FIXTURES / "llama" / CONFIG).read_text())
    for folder, arrays, values in (
        ("quantised", quantised, config | {"quantization_config": CONFIGS[name]}),
        ("whole", whole, config),
    ):
        (path / folder).mkdir()
        (path / folder / CONFIG).write_text(json.dumps(values))
        save_file(arrays, path / folder / "model.safetensors")
    return path / "quantised", path / "whole"


def params_of(path):
    folder = open_folder(path)
    return tree.flatten(folder.params(placed(folder.config, "float16")))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantised_folder_is_the_matrices_that_it_stands_for(tmp_path, name):
    quantised, whole = map(params_of, write(name, tmp_path))
    assert quantised.keys() == whole.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(quantised[path], leaf, path)


def test_an_export_after_it_has_whole_matrices(tmp_path):
    path, _ = write("awq", tmp_path)
    folder = open_folder(path)
    params = folder.params(placed(folder.config, "float16"))
    target = tmp_path / "again"
    write_folder(target, folder.config, params, dtype=np.dtype("float16"), like=path / CONFIG)
    assert "quantization_config" not in json.loads((target / CONFIG).read_text())
    assert open_folder(target).config == folder.config


REFUSED = {
    "bits": ("gptq", {"bits": 3}, "quantization_config: bits: given 3, expected 4 or 8"),
    "version": ("awq", {"version": "marlin"}, "quantization_config: version: given 'marlin'"),
    "format": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: given 'marlin'"),
    "rotations": (
        "compressed",
        {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        "quantization_config: transform_config: given",
    ),
    "an order of activations": (
        "compressed",
        {"config_groups": {"group_0": {"weights": WEIGHTS | {"actorder": "random"}}}},
        "weights: actorder: given 'random', expected one of False, 'weight'",
    ),
    "activations": (
        "compressed",
        {"config_groups": {"group_0": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}},
        "config_groups: group_0: input_activations",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_named(tmp_path, case):
    name, changes, message = REFUSED[case]
    shutil.copytree(FIXTURES / "llama", tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / CONFIG).read_text())
    values["quantization_config"] = CONFIGS[name] | changes
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "last"), [("gptq", "scales"), ("compressed_in_order", "weight_g_idx")]
)
def test_a_missing_tensor_of_a_matrix_is_named(tmp_path, name, last):
    """Without the order of activations groups would be taken for consecutive inputs."""
    path, _ = write(name, tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{last}"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=rf"layers.1.mlp.up_proj.{last}: given None"):
        open_folder(path)


def with_tensor(path, last, change):
    """The folder, in which a tensor of one matrix is changed; its name."""
    name = f"model.layers.1.mlp.up_proj.{last}"
    tensors = load_file(path / "model.safetensors")
    tensors[name] = np.ascontiguousarray(change(tensors.get(name)))
    save_file(tensors, path / "model.safetensors")
    return name


OF_ANOTHER_SIZE = {
    # Twice as many groups as the file says: the first half of the scales was taken for all.
    "compressed": ("weight_scale", lambda scales: scales.repeat(2, 1)),
    "awq": ("scales", lambda scales: scales.repeat(2, 0)),
    "gptq": ("qzeros", lambda zeros: zeros.repeat(2, 0)),
    "gptq_v2": ("g_idx", lambda groups: groups[:-1]),
}


@pytest.mark.parametrize("name", OF_ANOTHER_SIZE)
def test_scales_of_another_size_than_the_file_says_are_refused(tmp_path, name):
    path, _ = write(name, tmp_path)
    tensor = with_tensor(path, *OF_ANOTHER_SIZE[name])
    with pytest.raises(InputError, match=rf"{tensor}: given .*, expected .*quantization_config"):
        open_folder(path)


@pytest.mark.parametrize("cut", [lambda words: words[:-1], lambda words: words[:, :-1]])
def test_words_of_another_matrix_are_refused(tmp_path, cut):
    """Of too many rows the last were left out."""
    path, _ = write("compressed", tmp_path)
    with_tensor(path, "weight_shape", lambda size: size - np.array([1, 0]))
    with pytest.raises(InputError, match=r"weight_packed: given .*, expected .* rows of words"):
        open_folder(path)
    with_tensor(path, "weight_shape", lambda size: size + np.array([1, 0]))
    with_tensor(path, "weight_packed", cut)
    with pytest.raises(InputError, match=r"weight_packed: given .*, expected .* rows of words"):
        open_folder(path)


@pytest.mark.parametrize(("name", "last"), [("gptq", "g_idx"), ("compressed", "weight_g_idx")])
@pytest.mark.parametrize("wrong", [-2, 1000])
def test_an_input_of_no_group_is_refused(tmp_path, name, last, wrong):
    """Numpy takes a negative number for a group counted from the end."""
    path, _ = write(name, tmp_path)
    num_inputs = 32
    with_tensor(path, last, lambda _: np.full(num_inputs, wrong, np.int32))
    with pytest.raises(InputError, match=rf"{last}: given \({wrong}, {wrong}\), expected groups"):
        params_of(path)


def test_groups_whose_order_was_never_found_are_consecutive(tmp_path):
    """compressed-tensors begins with -1 for every input."""
    path, whole = write("compressed", tmp_path)
    with_tensor(path, "weight_g_idx", lambda _: np.full(32, -1, np.int32))
    got = params_of(path)
    for name, leaf in params_of(whole).items():
        np.testing.assert_array_equal(got[name], leaf, name)
