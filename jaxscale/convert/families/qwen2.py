"""Qwen2 and Qwen2.5, dense: Llama with biases of queries, keys and values.

Source: Yang et al. 2024 (arXiv 2407.10671).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama
from jaxscale.convert.family import (
    Family,
    read_around,
    read_attention,
    read_windows,
    write_windows,
)
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import read_rotary
from jaxscale.models.config import AttentionConfig, LayerConfig, ModelConfig

BIASES = ("q", "k", "v")


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    around = read_around(fields, names)
    return read_dense(fields, around, read_biased_attention(fields, around))


def read_dense(
    fields: Fields,
    around: dict[str, Any],
    attention: AttentionConfig,
) -> ModelConfig:
    """A dense model whose attention is known, but for its windows, which have a switch."""
    windows = read_windows(fields, around["num_layers"], has_switch=True)
    feed_forward = llama.read_feed_forward(fields)
    layers = [LayerConfig(each, feed_forward) for each in llama.with_windows(attention, windows)]
    return llama.of_layers(layers, fields, around)


def read_biased_attention(fields: Fields, around: dict[str, Any]) -> AttentionConfig:
    """The attention of every layer, but for windows."""
    return read_attention(
        fields,
        around["model_dim"],
        rotary=read_rotary(fields, max_length=around["max_length"]),
        biases=BIASES,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    return llama.write_dense(config) | write_switched_windows(config)


def write_switched_windows(config: ModelConfig) -> dict[str, Any]:
    """The fields of windows and of the switch beside them, which is on if there are any."""
    fields = write_windows(config)
    is_used = fields["sliding_window"] is not None
    return fields | {"use_sliding_window": is_used, "max_window_layers": 0}


QWEN2 = Family(("qwen2",), "Qwen2ForCausalLM", read, write, Layout(llama.NAMES))
