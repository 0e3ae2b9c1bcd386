"""What fields of a config.json mean that no fixture has otherwise, and that they are written so."""

import json

import pytest

from jaxscale.convert.families import BY_MODEL_TYPE
from jaxscale.convert.folder import CONFIG, read_config
from jaxscale.models.config import LinearScaling, YarnScaling
from tests.convert.test_families import FIXTURES, folder


def rotary(model):
    return model.layers[0].attention.rotary


def windows(model):
    return [layer.attention.window for layer in model.layers]


SCALED = {"rope_theta": 1e4, "factor": 4.0}
YARN = SCALED | {"rope_type": "yarn", "original_max_position_embeddings": 32}
MEANINGS = {
    "linear": (
        "llama",
        {"rope_parameters": SCALED | {"rope_type": "linear"}},
        lambda model: rotary(model).scaling,
        LinearScaling(4.0),
    ),
    "all of YaRN": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2}},
        lambda model: rotary(model).scaling,
        YarnScaling(4.0, 32, beta_fast=16.0, beta_slow=2.0, attention_factor=0.7),
    ),
    "the first name of LongRoPE": (
        "phi3_long",
        {
            "rope_parameters": None,
            "rope_scaling": {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]},
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
        },
        lambda model: rotary(model).scaling.long_factors,
        (3.0, 4.0),
    ),
    "magnitudes": (
        "phimoe_long",
        {},
        lambda model: (rotary(model).scaling.magnitude, rotary(model).scaling.long_magnitude),
        (1.1, 1.3),
    ),
    "a window that is switched off, as in Qwen2's releases": (
        "qwen2",
        {
            "sliding_window": 8,
            "use_sliding_window": False,
            "max_window_layers": 0,
            "layer_types": None,
        },
        windows,
        [None, None],
    ),
    "a window from the second layer on": (
        "qwen2",
        {
            "sliding_window": 8,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "layer_types": None,
        },
        windows,
        [None, 8],
    ),
    "windows of Gemma's even layers, as transformers 4 left them": (
        "gemma2",
        {"layer_types": None},
        windows,
        [8, None],
    ),
    "a window of Phi-3.5-MoE": ("phimoe", {"sliding_window": 8}, windows, [8, 8]),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_a_field_means_what_it_says_and_is_written_so(case):
    name, changes, read, wanted = MEANINGS[case]
    values = json.loads((FIXTURES / name / CONFIG).read_text()) | changes
    values = {field: value for field, value in values.items() if value is not None}
    family, names = BY_MODEL_TYPE[values["model_type"]], folder(name).leaves.keys()
    model = read_config(family, values, CONFIG, names)
    assert read(model) == wanted
    assert read_config(family, family.write(model), CONFIG, names) == model
