"""What a folder has missing, unknown or contradictory is refused, with the file and the field."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxscale.convert.folder import open_folder, write_folder
from jaxscale.models.config.facts import from_flat
from jaxscale.types import InputError
from tests.convert.test_families import BFLOAT16, FIXTURES, folder, params, placed


def copy(name, target, **changes):
    """A fixture with other fields; None removes one."""
    path = Path(shutil.copytree(FIXTURES / name, target / name))
    values = json.loads((path / "config.json").read_text())
    values |= changes
    values = {field: value for field, value in values.items() if value is not None}
    (path / "config.json").write_text(json.dumps(values))
    return path


def assert_refused(path, message):
    with pytest.raises(InputError, match=message):
        opened = open_folder(path)
        opened.params(placed(opened.config, "float32"))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
FIELDS = {
    "unknown": ("llama", {"sandwich_norm": True}, "config.json: sandwich_norm: given True"),
    "quantised": (
        "llama",
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "config.json: quantization_config: quant_method: given 'bitsandbytes', expected one of awq",
    ),
    "missing": ("llama", {"hidden_size": None}, "config.json: hidden_size: given None.*no default"),
    "no default": ("qwen3", {"attention_bias": None}, "config.json: attention_bias"),
    "type": ("llama", {"hidden_size": "32"}, "config.json: hidden_size: given '32'"),
    "activation": ("llama", {"hidden_act": "relu"}, "config.json: hidden_act: given 'relu'"),
    "architecture": (
        "llama",
        {"model_type": "lama"},
        "model_type: given 'lama'.*closest is 'llama'",
    ),
    "no rope_theta": ("mistral", {"rope_parameters": None}, "rope_parameters: rope_theta"),
    "theta": ("llama", {"rope_theta": 5e5}, "config.json: rope_theta: given 10000.0, expected 500"),
    "scaling": (
        "llama3",
        {"rope_scaling": {"type": "llama3", "factor": 4.0}},
        "config.json: factor: given 8.0, expected 4.0",
    ),
    "incomplete": ("llama", {"rope_parameters": LLAMA3}, "rope_parameters: low_freq_factor"),
    "nested": (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters: full_attention",
    ),
    "rope_type": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
        "rope_type: given 'dynamic'",
    ),
    "longrope": (
        "phi3_long",
        {"original_max_position_embeddings": 32},
        "original_max_position_embeddings: given 16, expected 32",
    ),
    "factor of longrope": (
        "phi3_long",
        {"rope_scaling": {"factor": 3.0}},
        r"rope_parameters: factor: given 3.0, expected max_position_embeddings / .* = 4.0",
    ),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: given 0.5"),
    "tied": ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings.*lm_head.weight"),
    "untied": ("qwen3", {"tie_word_embeddings": False}, "lm_head.weight: given None"),
    "layer_types": ("gemma2", {"layer_types": ["sliding_attention"]}, "config.json: layer_types"),
    "window": ("gemma2", {"sliding_window": None}, "config.json: layer_types"),
    "switch of windows": (
        "qwen2",
        {"sliding_window": 4, "use_sliding_window": None},
        "config.json: use_sliding_window: given None",
    ),
    "first window": (
        "qwen2",
        {
            "sliding_window": 4,
            "use_sliding_window": True,
            "max_window_layers": None,
            "layer_types": None,
        },
        "config.json: max_window_layers: given None",
    ),
    "windows of a mixture": (
        "qwen3_moe",
        {"sliding_window": 4, "use_sliding_window": True},
        "config.json: use_sliding_window: given True",
    ),
    "windows of Qwen2's mixture": (
        "qwen2_moe",
        {"sliding_window": 4, "use_sliding_window": True},
        "config.json: use_sliding_window: given True",
    ),
    "one gate over itself": (
        "mixtral",
        {"num_experts_per_tok": 1},
        "config.json: num_experts_per_tok: given 1",
    ),
    "one of SparseMixer's two": (
        "phimoe",
        {"num_experts_per_tok": 1},
        "config.json: num_experts_per_tok: given 1, expected 2",
    ),
    "causal": ("bert", {"is_decoder": True}, "config.json: is_decoder: given True"),
    "no heads": ("llama", {"num_attention_heads": 0}, "num_attention_heads: given 0"),
    "no heads of GPT-2": ("gpt2", {"n_head": 0}, "n_head: given 0"),
    "no end of layers": ("llama", {"num_hidden_layers": 1 << 40}, "num_hidden_layers: given 109"),
    "no end of experts": ("qwen3_moe", {"num_experts": 1 << 40}, "num_experts: given 109"),
    "no step": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: given 0"),
    "no scalar": ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: given 0"),
    "infinite": ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps: given inf"),
    "not a number": ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: given nan"),
    "experts": ("qwen3_moe", {"num_experts": 8}, "config.json: num_experts"),
    "heads": ("qwen2", {"num_attention_heads": 5}, "num_attention_heads.*hidden_size = 32"),
    "post-norm": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: given False"),
    "layers": ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight: given"),
    "fewer layers": ("llama", {"num_hidden_layers": 1}, "model.layers.1.*no such tensor"),
    "width": ("llama", {"intermediate_size": 20}, r"mlp.gate_proj.weight: given \(24, 32\)"),
    "biases": ("llama", {"attention_bias": True}, "q_proj.bias: given None"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_does_not_fit_is_named(tmp_path, name):
    fixture, changes, message = FIELDS[name]
    assert_refused(copy(fixture, tmp_path, **changes), message)


def test_both_names_of_a_norm_are_refused(tmp_path):
    """One of them would be left out, whichever comes last in the file."""
    path = copy("bert", tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "bert.embeddings.LayerNorm.weight"
    tensors[name.replace("weight", "gamma")] = tensors[name] + 1
    save_file(tensors, path / "model.safetensors")
    assert_refused(path, f"expected one tensor {name}")


def test_weights_that_are_no_floats_are_refused(tmp_path):
    path = copy("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    save_file(tensors, path / "model.safetensors")
    assert_refused(path, "model.norm.weight: given 'int8', expected floating-point")


def test_a_folder_without_weights_or_configuration_is_refused(tmp_path):
    assert_refused(tmp_path / "absent", "a folder of Hugging Face")
    path = copy("llama", tmp_path)
    (path / "config.json").write_text("{")
    assert_refused(path, "config.json: given None, expected a JSON object")
    (path / "config.json").unlink()
    assert_refused(path, "config.json: given None")


def test_rotary_fields_of_both_versions_may_stand_side_by_side(tmp_path):
    path = copy("llama3", tmp_path, rope_theta=100.0, rope_scaling={"type": "llama3"})
    assert open_folder(path).config == folder("llama3").config


def test_layers_before_the_first_window_see_all(tmp_path):
    switch = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    opened = open_folder(copy("qwen2", tmp_path, sliding_window=4, **switch))
    assert [layer.attention.window for layer in opened.config.layers] == [None, 4]


def test_a_model_of_no_family_is_not_exported(tmp_path):
    sizes = dict(num_heads=2, num_kv_heads=2, head_dim=4, num_layers=2, ffn_dim=8, max_length=8)
    odd = from_flat(vocab_size=9, model_dim=8, windows=(4, 2), **sizes)
    with pytest.raises(InputError, match="none of them has all that it has"):
        write_folder(tmp_path, odd, {}, dtype=BFLOAT16)
    with pytest.raises(InputError, match="has pattern/1/attention/window = 2"):
        write_folder(tmp_path, odd, {}, dtype=BFLOAT16, family="mistral")
    with pytest.raises(InputError, match="closest is 'mistral'"):
        write_folder(tmp_path, odd, {}, dtype=BFLOAT16, family="mistal")


def test_a_folder_with_a_model_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match=r"a folder without a config\.json"):
        path = copy("llama", tmp_path)
        write_folder(path, folder("llama").config, params("llama"), dtype=BFLOAT16)


def test_an_export_that_would_lose_a_magnitude_is_refused(tmp_path):
    """Transformers 4 has no field for it beside the factors: what was written said another."""
    rotary = json.loads((FIXTURES / "phi3_long" / "config.json").read_text())["rope_parameters"]
    path = copy("phi3_long", tmp_path, rope_parameters=rotary | {"attention_factor": 2.0})
    opened = open_folder(path)
    weights = opened.params(placed(opened.config, "float32"))
    settings = dict(dtype=np.dtype("float32"), like=path / "config.json")
    with pytest.raises(InputError, match="none of them has all that it has"):
        write_folder(tmp_path / "out", opened.config, weights, **settings)
