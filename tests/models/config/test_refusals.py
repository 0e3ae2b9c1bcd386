"""What the configuration of a model refuses: every message names the field."""

import dataclasses

import pytest

from jaxscale.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    LongRopeScaling,
    MaskedSamplingRouter,
    ModelConfig,
    NormConfig,
    RotaryConfig,
    SparseMixerRouter,
    TopKRouter,
)
from jaxscale.ops.attention import BlockLayout
from jaxscale.types import InputError

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
DENSE = FeedForwardConfig(24)
EXPERTS = ExpertsConfig(num_experts=4, dim=8)
LAYER = LayerConfig(ATTENTION, DENSE)
MIXTURE = LayerConfig(ATTENTION, EXPERTS)
MODEL = ModelConfig(vocab_size=40, num_layers=4, model_dim=16, max_length=16, pattern=(LAYER,))
WINDOWED = LayerConfig(dataclasses.replace(ATTENTION, window=4), DENSE)
BLOCKS = LayerConfig(dataclasses.replace(ATTENTION, layout=BlockLayout(1, 2)), DENSE)
V1 = SparseMixerRouter(version="v1")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            ATTENTION,
            {"num_heads": 0},
            "AttentionConfig.num_heads: given 0, expected a number above",
        ),
        (
            ATTENTION,
            {"num_heads": 4.0},
            "AttentionConfig.num_heads: given 4.0, expected a value of",
        ),
        (ATTENTION, {"num_kv_heads": 0}, "AttentionConfig.num_kv_heads: given 0"),
        (
            ATTENTION,
            {"num_kv_heads": 3},
            "AttentionConfig.num_kv_heads: given 3, expected num_heads % num_kv_heads == 0 (4 h",
        ),
        (ATTENTION, {"head_dim": 0}, "AttentionConfig.head_dim: given 0"),
        (ATTENTION, {"head_dim": 7}, "AttentionConfig.head_dim: given 7, expected an even number"),
        (
            ATTENTION,
            {"rotary": RotaryConfig(fraction=0.4)},
            "AttentionConfig.head_dim: given 8, expected an even number for rotary positions of",
        ),
        (
            ATTENTION,
            {"rotary": RotaryConfig(scaling=LongRopeScaling((1.0,)))},
            "LongRopeScaling.factors: given '1 factors', expected 4",
        ),
        (ATTENTION, {"rotary": 1e4}, "AttentionConfig.rotary: given 10000.0, expected a value of"),
        (
            ATTENTION,
            {"biases": ("q", "x")},
            "AttentionConfig.biases: given 'x', expected one of 'q', 'k', 'v', 'o'",
        ),
        (ATTENTION, {"biases": "q"}, "AttentionConfig.biases: given 'q', expected a value of type"),
        (
            ATTENTION,
            {"qk_norm": "layer"},
            "AttentionConfig.qk_norm: given 'layer', expected one of None, 'head', 'all'",
        ),
        (ATTENTION, {"window": 0}, "AttentionConfig.window: given 0"),
        (ATTENTION, {"softcap": 0.0}, "AttentionConfig.softcap: given 0.0"),
        (ATTENTION, {"softcap": float("nan")}, "AttentionConfig.softcap: given nan"),
        (ATTENTION, {"scale": -1.0}, "AttentionConfig.scale: given -1.0"),
        (
            ATTENTION,
            {"layout": (1, 2)},
            "AttentionConfig.layout: given (1, 2), expected a value of",
        ),
        (DENSE, {"dim": 0}, "FeedForwardConfig.dim: given 0"),
        (DENSE, {"dim": -3}, "FeedForwardConfig.dim: given -3"),
        (
            DENSE,
            {"activation": "tanh"},
            "FeedForwardConfig.activation: given 'tanh', expected one of 'swiglu', 'geglu'",
        ),
        (DENSE, {"use_bias": 1}, "FeedForwardConfig.use_bias: given 1, expected a value of type"),
        (EXPERTS, {"num_experts": 0}, "ExpertsConfig.num_experts: given 0"),
        (EXPERTS, {"dim": 0}, "ExpertsConfig.dim: given 0"),
        (EXPERTS, {"activation": "tanh"}, "ExpertsConfig.activation: given 'tanh'"),
        (
            EXPERTS,
            {"num_active": 5},
            "ExpertsConfig.num_active: given 5, expected 1 to num_experts = 4",
        ),
        (EXPERTS, {"num_active": 0}, "ExpertsConfig.num_active: given 0"),
        (
            EXPERTS,
            {"router": V1},
            'ExpertsConfig.num_active: given 2, expected 1 with SparseMixerRouter.version = "v1"',
        ),
        (
            EXPERTS,
            {"router": "topk"},
            "ExpertsConfig.router: given 'topk', expected a value of type",
        ),
        (EXPERTS, {"balance_loss": -0.1}, "ExpertsConfig.balance_loss: given -0.1"),
        (EXPERTS, {"z_loss": float("inf")}, "ExpertsConfig.z_loss: given inf"),
        (
            EXPERTS,
            {"dropout": 1.0},
            "ExpertsConfig.dropout: given 1.0, expected 0 or a probability below 1",
        ),
        (EXPERTS, {"dropout": -0.1}, "ExpertsConfig.dropout: given -0.1"),
        (TopKRouter(), {"is_renormalised": 1}, "TopKRouter.is_renormalised: given 1"),
        (
            MaskedSamplingRouter(),
            {"threshold": float("inf")},
            "MaskedSamplingRouter.threshold: given inf, expected 0 or a finite number above",
        ),
        (
            MaskedSamplingRouter(),
            {"mask": "huggingface"},
            "MaskedSamplingRouter.mask: given 'huggingface', expected one of 'paper', 'released'",
        ),
        (V1, {"threshold": -0.1}, "SparseMixerRouter.threshold: given -0.1"),
        (V1, {"mask": "code"}, "SparseMixerRouter.mask: given 'code'"),
        (
            V1,
            {"version": "v3"},
            "SparseMixerRouter.version: given 'v3', expected one of 'v1', 'v2'",
        ),
        (
            V1,
            {"expert_gradient": "both"},
            "SparseMixerRouter.expert_gradient: given 'both', expected one of 'paper', 'released'",
        ),
        (
            NormConfig(),
            {"kind": "batchnorm"},
            "NormConfig.kind: given 'batchnorm', expected one of 'rmsnorm', 'layernorm'",
        ),
        (
            NormConfig(),
            {"epsilon": -1.0},
            "NormConfig.epsilon: given -1.0, expected 0 or a finite number above",
        ),
        (
            NormConfig(),
            {"use_bias": True},
            "NormConfig.use_bias: given True, expected False with No",
        ),
        (
            LAYER,
            {"norm_position": "between"},
            "LayerConfig.norm_position: given 'between', expected one of 'before', 'after', 'both'",
        ),
        (
            LAYER,
            {"feed_forward": 24},
            "LayerConfig.feed_forward: given 24, expected a value of type",
        ),
        (LAYER, {"attention": None}, "LayerConfig.attention: given None, expected a value of type"),
        (MODEL, {"vocab_size": 0}, "ModelConfig.vocab_size: given 0, expected a number above 0"),
        (MODEL, {"num_layers": 0}, "ModelConfig.num_layers: given 0"),
        (MODEL, {"max_length": -1}, "ModelConfig.max_length: given -1"),
        (
            MODEL,
            {"model_dim": 16.0},
            "ModelConfig.model_dim: given 16.0, expected a value of type i",
        ),
        (
            MODEL,
            {"model_dim": "16"},
            "ModelConfig.model_dim: given '16', expected a value of type i",
        ),
        (MODEL, {"logit_softcap": 0.0}, "ModelConfig.logit_softcap: given 0.0"),
        (MODEL, {"init_std": float("nan")}, "ModelConfig.init_std: given nan"),
        (MODEL, {"pattern": ()}, "ModelConfig.pattern: given (), expected at least one layer"),
        (MODEL, {"pattern": LAYER}, "ModelConfig.pattern: given LayerConfig("),
        (
            MODEL,
            {"pattern": (LAYER,) * 3},
            "ModelConfig.num_layers: given 4, expected (num_layers - len(prefix)) % len(pattern)",
        ),
        (
            MODEL,
            {"prefix": (LAYER,) * 4},
            "ModelConfig.prefix: given '4 layers', expected at most 3 layers",
        ),
        (
            MODEL,
            {"prefix": (MIXTURE,)},
            "ModelConfig.prefix: given 'a mixture of experts', expected dense layers",
        ),
        (
            MODEL,
            {"pattern": (MIXTURE, LayerConfig(ATTENTION, ExpertsConfig(num_experts=2, dim=8)))},
            "ModelConfig.pattern: given [2, 4], expected one ExpertsConfig.num_experts for all",
        ),
        (
            MODEL,
            {"is_causal": False, "pattern": (WINDOWED,)},
            "ModelConfig.is_causal: given False, expected True where a layer has a window or",
        ),
        (
            MODEL,
            {"is_causal": False, "prefix": (WINDOWED,)},
            "ModelConfig.is_causal: given False, expected True where a layer has a window or",
        ),
        (
            MODEL,
            {"is_causal": False, "pattern": (BLOCKS,)},
            "ModelConfig.is_causal: given False, expected True where a layer has a window or",
        ),
    ],
)
def test_a_wrong_value_is_named(part, change, message):
    with pytest.raises(InputError) as error:
        dataclasses.replace(part, **change)
    assert message in str(error.value)


@pytest.mark.parametrize("norm_position", ["after", "both"])
def test_attention_and_feed_forward_side_by_side_have_one_norm_before_them(norm_position):
    with pytest.raises(InputError, match=r"LayerConfig\.is_parallel: given True, expected False"):
        LayerConfig(ATTENTION, DENSE, norm_position, is_parallel=True)


def test_a_head_without_rotary_positions_may_have_an_odd_size():
    assert dataclasses.replace(ATTENTION, head_dim=7, rotary=None).head_dim == 7
