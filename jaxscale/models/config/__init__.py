"""The configuration of a model in parts, each a frozen dataclass that checks itself."""

from jaxscale.models.config.attention import AttentionConfig
from jaxscale.models.config.experts import (
    DenseMixerRouter,
    ExpertsConfig,
    MaskedSamplingRouter,
    Router,
    SparseMixerRouter,
    TopKRouter,
)
from jaxscale.models.config.feed_forward import FeedForwardConfig
from jaxscale.models.config.lora import LoraConfig
from jaxscale.models.config.model import LayerConfig, ModelConfig, NormConfig
from jaxscale.ops.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RotaryConfig,
    YarnScaling,
)

__all__ = [
    "AttentionConfig",
    "DenseMixerRouter",
    "ExpertsConfig",
    "FeedForwardConfig",
    "LayerConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "LoraConfig",
    "MaskedSamplingRouter",
    "ModelConfig",
    "NormConfig",
    "RotaryConfig",
    "Router",
    "SparseMixerRouter",
    "TopKRouter",
    "YarnScaling",
]
