"""Qwen3, dense and mixture of experts: Llama with a norm of each head's queries and keys.

Source: Yang et al. 2025 (arXiv 2505.09388).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama
from jaxscale.convert.families.qwen2 import read_dense, write_switched_windows
from jaxscale.convert.family import (
    EVERY_BIAS,
    FULL,
    GATED,
    Family,
    check_gates,
    read_around,
    read_attention,
)
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import read_rotary
from jaxscale.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    TopKRouter,
)
from jaxscale.types import InputError

EXPERTS = {
    "moe/norm": "post_attention_layernorm",
    "moe/router": "mlp.gate",
    "moe/experts/gate": ("mlp.experts.{expert}.gate_proj", "mlp.experts.gate_up_proj"),
    "moe/experts/up": ("mlp.experts.{expert}.up_proj", "mlp.experts.gate_up_proj"),
    "moe/experts/down": ("mlp.experts.{expert}.down_proj", "mlp.experts.down_proj"),
}
NUM_EXPERTS = ("num_experts", "num_local_experts")  # in transformers 4 and 5


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a dense model's config.json."""
    around = read_around(fields, names)
    return read_dense(fields, around, read_normed_attention(fields, around, "head"))


def read_normed_attention(
    fields: Fields,
    around: dict[str, Any],
    qk_norm: str,
) -> AttentionConfig:
    """The attention of every layer, but for windows; `qk_norm` is of `AttentionConfig`."""
    return read_attention(
        fields,
        around["model_dim"],
        rotary=read_rotary(fields, max_length=around["max_length"]),
        biases=EVERY_BIAS if fields.take("attention_bias", bool) else (),
        qk_norm=qk_norm,
    )


def read_moe(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a mixture's config.json; layers that it lists are dense."""
    around = read_around(fields, names)
    return read_mixture(fields, around, read_normed_attention(fields, around, "head"))


def read_mixture(
    fields: Fields,
    around: dict[str, Any],
    attention: AttentionConfig,
    shared_dim: int = 0,
) -> ModelConfig:
    """The model of a mixture whose attention is known; `shared_dim` is of `ExpertsConfig`.

    Raises:
        InputError: as `open_folder`; also for windows, for versions of transformers differ in which
            layers of a mixture have one, and no release has any.
    """
    fields.expect("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers"):
        fields.take(name, Any, None)
    fields.expect("layer_types", [FULL] * around["num_layers"])
    activation = fields.choose("hidden_act", GATED)
    dense = FeedForwardConfig(fields.take("intermediate_size", int), activation)
    experts = ExpertsConfig(
        num_experts=read_num_experts(fields),
        num_active=fields.take("num_experts_per_tok", int),
        dim=fields.take("moe_intermediate_size", int),
        activation=activation,
        router=TopKRouter(fields.take("norm_topk_prob", bool)),
        shared_dim=shared_dim,
    )
    check_gates(fields, experts)
    step = fields.count("decoder_sparse_step", 1)
    listed = fields.take("mlp_only_layers", tuple, ())
    layers = []
    for number in range(around["num_layers"]):
        is_moe = number not in listed and (number + 1) % step == 0
        layers.append(LayerConfig(attention, experts if is_moe else dense))
    return llama.of_layers(layers, fields, around)


def read_num_experts(fields: Fields) -> int:
    """The number of experts, under the name of either version."""
    older, newer = (fields.count(name, 0) for name in NUM_EXPERTS)
    if not (older or newer) or (older and newer and older != newer):
        expected = f"one number in {' or '.join(NUM_EXPERTS)}"
        raise InputError(fields.place(NUM_EXPERTS[0]), older, expected)
    return older or newer


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a dense model."""
    has_biases = bool(config.layers[0].attention.biases)
    fields = llama.write_dense(config) | write_switched_windows(config)
    return fields | {"attention_bias": has_biases}


def write_moe(config: ModelConfig) -> dict[str, Any]:
    """The fields of a mixture."""
    return write(config) | write_mixture(config)


def write_mixture(config: ModelConfig) -> dict[str, Any]:
    """The fields of a mixture's feed-forwards."""
    dense = [number for number, layer in enumerate(config.layers) if not layer.is_moe]
    experts = next((layer.feed_forward for layer in config.layers if layer.is_moe), None)
    first = config.layers[dense[0] if dense else 0].feed_forward
    return {
        "intermediate_size": first.dim,
        "moe_intermediate_size": getattr(experts, "dim", 0),
        "num_experts": config.num_experts,
        "num_experts_per_tok": getattr(experts, "num_active", 0),
        "norm_topk_prob": getattr(getattr(experts, "router", None), "is_renormalised", None),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


QWEN3 = Family(("qwen3",), "Qwen3ForCausalLM", read, write, Layout(llama.NAMES))
QWEN3_MOE = Family(
    ("qwen3_moe",),
    "Qwen3MoeForCausalLM",
    read_moe,
    write_moe,
    Layout(llama.NAMES | EXPERTS),
)
