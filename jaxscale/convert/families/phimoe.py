"""Phi-3.5-MoE and GRIN-MoE: SparseMixer-v2, LayerNorm, and biases around the experts.

Source: Liu et al. 2024 (arXiv 2409.12136); Abdin et al. 2024 (arXiv 2404.14219).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama, mixtral
from jaxscale.convert.family import (
    EVERY_BIAS,
    Family,
    pattern_of,
    read_around,
    read_attention,
    read_windows,
)
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import LONGROPE_WITH_MAGNITUDES, read_rotary, write_magnitudes
from jaxscale.models.config import (
    LayerConfig,
    ModelConfig,
    NormConfig,
    RotaryConfig,
    SparseMixerRouter,
)
from jaxscale.types import InputError

NUM_ACTIVE = 2


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    around = read_around(fields, names)
    rotary = read_rotary(
        fields,
        max_length=around["max_length"],
        scalings=LONGROPE_WITH_MAGNITUDES,
    )
    attention = read_attention(
        fields,
        around["model_dim"],
        rotary=rotary,
        biases=EVERY_BIAS if fields.take("attention_bias", bool) else (),
    )
    fields.take("input_jitter_noise", float, 0.0)  # of the training
    router = SparseMixerRouter(fields.take("router_jitter_noise", float), mask="released")
    experts = mixtral.read_experts(fields, router=router)
    if experts.num_active != NUM_ACTIVE:
        expected = f"{NUM_ACTIVE}: the released router takes one after the other"
        raise InputError(fields.place("num_experts_per_tok"), experts.num_active, expected)
    windows = read_windows(fields, around["num_layers"])
    layers = [LayerConfig(each, experts) for each in llama.with_windows(attention, windows)]
    use_head_bias = fields.take("lm_head_bias", bool)
    epsilon = fields.take("rms_norm_eps", float)  # of a LayerNorm, for all its name
    norm = NormConfig("layernorm", epsilon, use_bias=True)
    around |= {"norm": norm, "use_head_bias": use_head_bias}
    return ModelConfig(pattern=pattern_of(layers), **around)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    attention, experts = config.layers[0].attention, config.layers[0].feed_forward
    router = getattr(experts, "router", None)
    return {
        **mixtral.write(config),
        **write_magnitudes(attention.rotary or RotaryConfig()),
        "attention_bias": bool(attention.biases),
        "lm_head_bias": config.use_head_bias,
        "router_jitter_noise": getattr(router, "threshold", 0.0),
    }


PHIMOE = Family(
    ("phimoe", "grinmoe"),
    "PhimoeForCausalLM",
    read,
    write,
    Layout(mixtral.NAMES),
)
