"""What a model's configuration refuses, and the layers and FLOPs that follow from it."""

import dataclasses

import pytest

from jaxscale.models.config import (
    LayerKind,
    ModelConfig,
    checkpoint_facts,
    training_flops_per_token,
)
from jaxscale.models.parameters import count_parameters
from jaxscale.types import InputError

SMALL = ModelConfig(
    vocab_size=40,
    num_layers=4,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    max_length=16,
)
EXPERTS = dict(num_experts=4, expert_dim=8)
MIXTRAL = ModelConfig(
    vocab_size=32000,
    num_layers=32,
    model_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=14336,
    max_length=32768,
    moe_pattern=(True,),
    num_experts=8,
    num_active_experts=2,
    expert_dim=14336,
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "ModelConfig.vocab_size: given 0, expected a number above 0"),
        ({"model_dim": 16.0}, "ModelConfig.model_dim: given 16.0, expected a value of type int"),
        ({"model_dim": "16"}, "ModelConfig.model_dim: given '16', expected a value of type int"),
        ({"ffn_dim": 0}, "ModelConfig.ffn_dim: given 0"),
        ({"moe_pattern": (False, True), "ffn_dim": 0} | EXPERTS, "ModelConfig.ffn_dim: given 0"),
        (
            {"moe_pattern": (True,), "ffn_dim": -3, "num_layers": 5, "num_dense_prefix": 1}
            | EXPERTS,
            "given -3",
        ),
        ({"logit_softcap": 0.0}, "ModelConfig.logit_softcap: given 0.0"),
        ({"attention_softcap": 0.0}, "ModelConfig.attention_softcap: given 0.0"),
        (
            {"norm_epsilon": -1.0},
            "ModelConfig.norm_epsilon: given -1.0, expected 0 or a finite number above",
        ),
        (
            {"router_threshold": float("inf")},
            "router_threshold: given inf, expected 0 or a finite number",
        ),
        ({"rope_theta": 0.0}, "ModelConfig.rope_theta: given 0.0"),
        ({"init_std": float("nan")}, "ModelConfig.init_std: given nan"),
        (
            {"norm": "batchnorm"},
            "ModelConfig.norm: given 'batchnorm', expected one of 'rmsnorm', 'layernorm'",
        ),
        ({"activation": "relu"}, "ModelConfig.activation: given 'relu'"),
        ({"positions": "alibi"}, "ModelConfig.positions: given 'alibi'"),
        (
            {"num_kv_heads": 3},
            "ModelConfig.num_kv_heads: given 3, expected num_heads % num_kv_heads == 0 (4 heads)",
        ),
        ({"head_dim": 7}, "ModelConfig.head_dim: given 7, expected an even number"),
        ({"windows": ()}, "ModelConfig.windows: given ()"),
        ({"windows": (None, 0)}, "ModelConfig.windows: given 0"),
        ({"windows": (None, 2, 4)}, "period lcm(len(windows), len(moe_pattern)) = 3"),
        ({"num_dense_prefix": 4}, "ModelConfig.num_dense_prefix: given 4, expected 0 to 3"),
        ({"moe_pattern": (True,)}, "ModelConfig.num_experts: given 0"),
        ({"moe_pattern": (True,), "num_experts": 4}, "ModelConfig.expert_dim: given 0"),
        (
            {"moe_pattern": (True,), "num_experts": 4, "expert_dim": 8, "num_active_experts": 5},
            "ModelConfig.num_active_experts: given 5, expected 1 to num_experts = 4",
        ),
        (
            {"router": "topk"},
            "ModelConfig.router: given 'topk', expected one of 'gshard', 'sparsemixer'",
        ),
        (
            {"router_mask": "huggingface"},
            "ModelConfig.router_mask: given 'huggingface', expected one of 'paper', 'rele",
        ),
        ({"router_threshold": -0.1}, "ModelConfig.router_threshold: given -0.1"),
        (
            {"expert_dropout": 1.0},
            "ModelConfig.expert_dropout: given 1.0, expected 0 or a probability below 1",
        ),
        (
            {"moe_pattern": (True,), "router": "sparsemixer"} | EXPERTS,
            'ModelConfig.num_active_experts: given 2, expected 1 with ModelConfig.router = "sparsemixer"',
        ),
    ],
)
def test_a_wrong_value_is_named(change, message):
    with pytest.raises(InputError) as error:
        dataclasses.replace(SMALL, **change)
    assert message in str(error.value)


def test_patterns_repeat_after_the_prefix():
    config = dataclasses.replace(
        SMALL,
        num_layers=5,
        windows=(8, None),
        moe_pattern=(True, False),
        num_dense_prefix=1,
        num_experts=2,
        expert_dim=4,
    )
    local, full = LayerKind(8, True), LayerKind(None, False)
    assert config.layers == (LayerKind(8, False), local, full, local, full)
    assert (config.period, config.num_periods) == (2, 2)


def test_mixtral_has_its_published_size():
    """46.7e9 parameters, 12.9e9 of them active (arXiv 2401.04088, table 1), from the terms of the architecture."""
    dim, ffn, vocab, num_layers, num_experts = 4096, 14336, 32000, 32, 8
    attention = 2 * dim * dim + 2 * dim * 1024
    expert = 3 * dim * ffn
    rest = num_layers * (attention + 2 * dim + dim * num_experts) + dim + vocab * dim
    total, active = count_parameters(MIXTRAL)
    assert total == rest + num_layers * num_experts * expert + vocab * dim == 46_702_792_704
    assert active == rest + num_layers * 2 * expert
    assert round((active + vocab * dim) / 1e9, 1) == 12.9


def test_a_tied_embedding_is_counted_once_and_active():
    untied, tied = (
        count_parameters(dataclasses.replace(SMALL, is_tied=is_tied)) for is_tied in (False, True)
    )
    assert untied[0] - tied[0] == 40 * 16
    assert untied[1] == tied[1] == tied[0]


@pytest.mark.parametrize("window", [None, 1, 64, 512, 1024, 4096])
def test_attention_flops_count_the_pairs_that_attend(window):
    length = 1024
    config = dataclasses.replace(SMALL, windows=(window,))
    pairs = sum(min(t + 1, window or length) for t in range(length))
    flops = training_flops_per_token(config, 0, length)
    wanted = 3 * 4 * pairs / length * config.num_heads * config.head_dim * config.num_layers
    assert flops == pytest.approx(wanted, abs=12 * 32 * 4)  # the diagonal counts half


def test_each_active_parameter_costs_six_flops():
    more, less = (training_flops_per_token(SMALL, n, 8) for n in (1000, 0))
    assert more - less == 6000


def test_a_checkpoint_is_of_what_shapes_parameters_and_what_they_compute():
    facts = checkpoint_facts(SMALL)
    for change in (
        {"init_std": 0.5},
        {"balance_loss": 0.5},
        {"router_z_loss": 0.5},
        {"max_length": 32},
    ):
        assert checkpoint_facts(dataclasses.replace(SMALL, **change)) == facts
    for change in ({"rope_theta": 5.0}, {"norm_epsilon": 1e-3}, {"num_layers": 2}):
        assert checkpoint_facts(dataclasses.replace(SMALL, **change)) != facts
    for router in ("densemixer", "masked_sampling"):  # which serve as "gshard" does
        assert (
            checkpoint_facts(dataclasses.replace(SMALL, router=router, router_threshold=0.3))
            == facts
        )
    drawn = dataclasses.replace(SMALL, router="sparsemixer_v2")
    assert checkpoint_facts(
        dataclasses.replace(drawn, router_expert_gradient="released")
    ) == checkpoint_facts(drawn)
    for change in ({"router": "gshard"}, {"router_threshold": 0.1}, {"router_mask": "released"}):
        assert checkpoint_facts(dataclasses.replace(drawn, **change)) != checkpoint_facts(drawn)
    learned = dataclasses.replace(SMALL, positions="learned")
    assert checkpoint_facts(learned) != checkpoint_facts(
        dataclasses.replace(learned, max_length=32)
    )
    assert "vocab_size" not in facts["defaults"] and facts["defaults"]["rope_theta"] == 10000.0
