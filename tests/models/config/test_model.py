"""The layers, parameter counts and FLOPs that follow from a model's configuration."""

import dataclasses

import pytest

from jaxscale.models.config import ExpertsConfig, FeedForwardConfig, ModelConfig
from jaxscale.models.config.facts import from_flat
from jaxscale.models.config.model import training_flops_per_token
from jaxscale.models.parameters import count_parameters, parameter_table
from tests.models.examples import SHAPE

SMALL = from_flat(**SHAPE)
MIXTRAL = from_flat(
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


def test_patterns_repeat_after_the_prefix():
    config = from_flat(
        **SHAPE | {"num_layers": 5},
        windows=(8, None),
        moe_pattern=(True, False),
        num_dense_prefix=1,
        num_experts=2,
        expert_dim=4,
    )
    kinds = [(layer.attention.window, layer.is_moe) for layer in config.layers]
    assert kinds == [(8, False), (8, True), (None, False), (8, True), (None, False)]
    assert (config.period, config.num_periods, config.num_experts) == (2, 2, 2)


def test_a_dense_model_has_no_experts():
    assert SMALL.num_experts == 0
    assert (SMALL.period, SMALL.num_periods, len(SMALL.layers)) == (1, 4, 4)


def test_mixtral_has_its_published_size():
    """46.7e9 parameters, 12.9e9 of them active (arXiv 2401.04088, table 1), term by term."""
    dim, ffn, vocab, num_layers, num_experts = 4096, 14336, 32000, 32, 8
    attention = 2 * dim * dim + 2 * dim * 1024
    expert = 3 * dim * ffn
    layers = num_layers * (attention + 2 * dim + dim * num_experts)
    rest = layers + dim + vocab * dim
    total, active = count_parameters(parameter_table(MIXTRAL))
    assert total == rest + num_layers * num_experts * expert + vocab * dim == 46_702_792_704
    assert active == rest + num_layers * 2 * expert
    assert round((active + vocab * dim) / 1e9, 1) == 12.9


def test_a_tied_embedding_is_counted_once_and_active():
    untied = count_parameters(parameter_table(SMALL))
    tied = count_parameters(parameter_table(dataclasses.replace(SMALL, is_tied=True)))
    assert untied[0] - tied[0] == 40 * 16
    assert untied[1] == tied[1] == tied[0]


def test_each_mixture_has_its_own_share_of_active_experts():
    """One expert of four in one layer, three of four in the next."""

    def active(*numbers):
        layers = [
            dataclasses.replace(SMALL.pattern[0], feed_forward=ExpertsConfig(4, 8, num_active=num))
            for num in numbers
        ]
        return count_parameters(parameter_table(dataclasses.replace(SMALL, pattern=tuple(layers))))

    expert = 3 * 16 * 8
    total, few = active(1)
    assert active(1, 3) == (total, few + SMALL.num_layers // 2 * 2 * expert)


def test_layers_of_a_pattern_may_have_feed_forwards_of_several_widths():
    first = SMALL.pattern[0]
    wide = dataclasses.replace(first, feed_forward=FeedForwardConfig(48))
    both = dataclasses.replace(SMALL, pattern=(first, wide))
    (more, _), (fewer, _) = (count_parameters(parameter_table(c)) for c in (both, SMALL))
    assert more - fewer == 2 * 3 * 16 * 24


@pytest.mark.parametrize("window", [None, 1, 64, 512, 1024, 4096])
def test_attention_flops_count_the_pairs_that_attend(window):
    length, num_heads, head_dim, num_layers = 1024, 4, 8, 4
    config = from_flat(**SHAPE, windows=(window,))
    pairs = sum(min(t + 1, window or length) for t in range(length))
    flops = training_flops_per_token(config, 0, length)
    wanted = 3 * 4 * pairs / length * num_heads * head_dim * num_layers
    assert flops == pytest.approx(wanted, abs=12 * 32 * 4)  # the diagonal counts half


def test_without_a_causal_mask_every_pair_attends():
    causal, length = training_flops_per_token(SMALL, 0, 64), 64
    both = training_flops_per_token(dataclasses.replace(SMALL, is_causal=False), 0, length)
    assert both == 3 * 4 * length * 4 * 8 * 4
    assert causal == both / 2


def test_each_active_parameter_costs_six_flops():
    more, less = (training_flops_per_token(SMALL, n, 8) for n in (1000, 0))
    assert more - less == 6000


def test_the_longest_sequence_is_no_part_of_what_is_counted():
    longer = dataclasses.replace(SMALL, max_length=4096)
    assert isinstance(longer, ModelConfig)
    assert count_parameters(parameter_table(longer)) == count_parameters(parameter_table(SMALL))
