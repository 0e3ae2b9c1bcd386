"""Phi-3 mini and medium, Phi-4 and Phi-4-mini: Llama with fused projections and LongRoPE.

Source: Abdin et al. 2024 (arXiv 2404.14219).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama, mistral
from jaxscale.convert.family import Family
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import LONGROPE
from jaxscale.models.config import ModelConfig

NAMES = llama.NAMES | {
    "attention/q": "self_attn.qkv_proj",
    "attention/k": "self_attn.qkv_proj",
    "attention/v": "self_attn.qkv_proj",
    "ffn/gate": "mlp.gate_up_proj",
    "ffn/up": "mlp.gate_up_proj",
}


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("attention_bias", False)  # Phi-3.5 and Phi-4 say so; the class has none
    return mistral.read(fields, names, is_partial=True, scalings=LONGROPE)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    # Without a token for padding the class takes one that a small vocabulary has not.
    fields = {"original_max_position_embeddings": config.max_length, "pad_token_id": None}
    return fields | mistral.write(config)


PHI3 = Family(("phi3",), "Phi3ForCausalLM", read, write, Layout(NAMES))
