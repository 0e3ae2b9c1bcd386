"""Mistral: Llama with a window in every layer, or in none.

Source: Jiang et al. 2023 (arXiv 2310.06825).
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
from jaxscale.models.config import LayerConfig, ModelConfig


def read(fields: Fields, names: Collection[str], **rotary_parts: Any) -> ModelConfig:
    """The model of a config.json; `rotary_parts` are other arguments of `read_rotary`."""
    around = read_around(fields, names)
    rotary = read_rotary(fields, max_length=around["max_length"], **rotary_parts)
    attention = read_attention(fields, around["model_dim"], rotary=rotary)
    feed_forward = llama.read_feed_forward(fields)
    windows = read_windows(fields, around["num_layers"])
    attentions = llama.with_windows(attention, windows)
    layers = [LayerConfig(each, feed_forward) for each in attentions]
    return llama.of_layers(layers, fields, around)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    return llama.write_dense(config) | write_windows(config)


MISTRAL = Family(("mistral",), "MistralForCausalLM", read, write, Layout(llama.NAMES))
