"""Qwen2's mixtures of experts, of which one is visited by every token.

Source: Yang et al. 2024 (arXiv 2407.10671), section 2.2.2.
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama, qwen2, qwen3
from jaxscale.convert.family import Family, read_around
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.models.config import ModelConfig

SHARED = {
    "moe/shared/gate": "mlp.shared_expert.gate_proj",
    "moe/shared/up": "mlp.shared_expert.up_proj",
    "moe/shared/down": "mlp.shared_expert.down_proj",
    "moe/shared/weight": "mlp.shared_expert_gate",
}


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    around = read_around(fields, names)
    fields.expect("qkv_bias", True)
    attention = qwen2.read_biased_attention(fields, around)
    shared_dim = fields.take("shared_expert_intermediate_size", int)
    return qwen3.read_mixture(fields, around, attention, shared_dim)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    experts = next((layer.feed_forward for layer in config.layers if layer.is_moe), None)
    shared_dim = getattr(experts, "shared_dim", 0)
    return (
        qwen2.write(config)
        | qwen3.write_mixture(config)
        | {"shared_expert_intermediate_size": shared_dim, "qkv_bias": True}
    )


QWEN2_MOE = Family(
    ("qwen2_moe",),
    "Qwen2MoeForCausalLM",
    read,
    write,
    Layout(llama.NAMES | qwen3.EXPERTS | SHARED),
)
