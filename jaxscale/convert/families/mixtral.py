"""Mixtral: Mistral with a mixture of experts, whose gates are renormalised.

Its files have experts one by one, or packed where transformers 5 wrote them.
Source: Jiang et al. 2024 (arXiv 2401.04088).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama
from jaxscale.convert.family import (
    GATED,
    Family,
    check_gates,
    read_around,
    read_attention,
    read_windows,
    write_windows,
)
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import read_rotary
from jaxscale.models.config import ExpertsConfig, LayerConfig, ModelConfig

EXPERTS = {
    "moe/norm": "post_attention_layernorm",
    "moe/router": ("block_sparse_moe.gate", "mlp.gate", "mlp.router"),
    "moe/experts/gate": ("block_sparse_moe.experts.{expert}.w1", "mlp.experts.gate_up_proj"),
    "moe/experts/up": ("block_sparse_moe.experts.{expert}.w3", "mlp.experts.gate_up_proj"),
    "moe/experts/down": ("block_sparse_moe.experts.{expert}.w2", "mlp.experts.down_proj"),
}
NAMES = llama.AROUND_LAYERS | llama.ATTENTION | EXPERTS


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    around = read_around(fields, names)
    rotary = read_rotary(fields, max_length=around["max_length"])
    attention = read_attention(fields, around["model_dim"], rotary=rotary)
    fields.take("router_jitter_noise", float, 0.0)  # of the training
    experts = read_experts(fields)
    windows = read_windows(fields, around["num_layers"])
    layers = [LayerConfig(each, experts) for each in llama.with_windows(attention, windows)]
    return llama.of_layers(layers, fields, around)


def read_experts(fields: Fields, **more: Any) -> ExpertsConfig:
    """Experts as large as `intermediate_size`; `more` are other arguments of `ExpertsConfig`."""
    experts = ExpertsConfig(
        num_experts=fields.count("num_local_experts"),
        num_active=fields.take("num_experts_per_tok", int),
        dim=fields.take("intermediate_size", int),
        activation=fields.choose("hidden_act", GATED),
        **more,
    )
    return check_gates(fields, experts)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    return llama.write_dense(config) | write_windows(config) | write_experts(config)


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """The fields of the last layer's experts that a dense model has not."""
    experts = config.layers[-1].feed_forward
    return {
        "num_local_experts": getattr(experts, "num_experts", 0),
        "num_experts_per_tok": getattr(experts, "num_active", 0),
    }


MIXTRAL = Family(("mixtral",), "MixtralForCausalLM", read, write, Layout(NAMES))
