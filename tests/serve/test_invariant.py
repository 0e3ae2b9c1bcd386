"""The strategy BatchInvariant: a sequence's log-probabilities have the same bits everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import BatchInvariant, ExecutionConfig
from jaxscale.models.losses import token_log_probabilities
from jaxscale.ops.precision import Policy
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.serve.test_decoding import params_of, with_layout

SMALL = dict(
    vocab_size=67,
    model_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=40,
    max_length=256,
    num_experts=4,
    expert_dim=16,
)
MODEL = from_flat(**SMALL, num_layers=2, windows=(None, 70), moe_pattern=(False, True))
EXPERTS = from_flat(**SMALL | dict(max_length=128), num_layers=1, moe_pattern=(True,))
STRATEGY = BatchInvariant(num_rows=32, expert_rows=8)
TRAINING = ExecutionConfig(strategy=STRATEGY, num_loss_chunks=2)
SIZES = dict(token_budget=96, max_sequences=8, block_size=64, max_prompts=4, num_blocks=20)
RNG = np.random.default_rng(0)
LONG = RNG.integers(0, 67, 150).tolist()
PROMPTS = [LONG, LONG[:130] + [5, 6], [3], LONG[:64], [9] * 70]
NEW = 6
CONFIG = RequestConfig(SamplingConfig(seed=3), max_new_tokens=NEW, num_logprobs=2)


def decoder(model):
    return Decoder(model, TRAINING.operations(), Policy(compute="bfloat16"), TRAINING)


def engine(model=MODEL, **changes):
    config = EngineConfig(**SIZES | changes)
    return Engine(decoder(model), params_of(model), config=config)


def drawn(found):
    """Tokens with the bits of their log-probabilities."""
    return [(each.tokens, [value.drawn for value in each.logprobs]) for (each,) in found]


def trained(model, rows):
    """Log-probabilities of the next tokens of rows [B, T], as a training step computes them."""
    tokens = np.asarray(rows, np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {"tokens": jnp.asarray(tokens), "positions": jnp.asarray(positions)}
    labels = jnp.asarray(np.roll(tokens, -1, 1))
    bound = decoder(model)

    @jax.jit
    def step(params):
        def loss(params):
            x = bound.embed(params, batch)
            x, _, _ = bound.run_layers(params, x, bound.tokens(batch))
            found = token_log_probabilities(bound, params, x, labels)
            return found.sum(), found

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, found), gradient = step(params_of(model))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    return np.asarray(found)


def check_training(model, prompts, answers):
    """That a training step over these sequences, in one batch, has the bits of their answers."""
    texts = [prompt + tokens for prompt, (tokens, _) in zip(prompts, answers, strict=True)]
    length = -(-max(map(len, texts)) // 2) * 2
    rows = trained(model, [text + [0] * (length - len(text)) for text in texts])
    for row, prompt, (_, logprobs) in zip(rows, prompts, answers, strict=True):
        start = len(prompt) - 1
        assert row[start : start + NEW].tolist() == logprobs


def test_a_mixtures_bits_are_those_of_a_training_step_in_any_batch():
    """In bfloat16: beside another sequence, split or not, from a cached prefix or not."""
    one = engine(EXPERTS, max_sequences=2, token_budget=80, max_prompts=2)
    prompts = [LONG[:75], LONG[:66]]
    cold = drawn(one.generate(prompts, CONFIG))
    check_training(EXPERTS, prompts, cold)
    warm = one.generate(prompts[::-1], CONFIG)
    assert [each.num_cached for (each,) in warm] == [64, 64]
    assert drawn(warm) == cold[::-1]


@pytest.mark.long
def test_without_it_log_probabilities_are_trainings_within_the_rounding_of_bfloat16():
    """Experts included: off by a few steps of logits of size 4, a token aside that a router sends
    elsewhere for a difference in the last bit."""
    plain = dataclasses.replace(decoder(EXPERTS), execution=ExecutionConfig())
    config = EngineConfig(**SIZES | dict(block_size=16, num_blocks=40))
    engine = Engine(plain, params_of(EXPERTS), config=config)
    prompts = [LONG[:75], LONG[:66]]
    scoring = dataclasses.replace(CONFIG, num_prompt_logprobs=0)
    found = engine.generate(prompts, scoring)
    rows = trained(EXPERTS, [prompt + [0] * (76 - len(prompt)) for prompt in prompts])
    for row, prompt, (one,) in zip(rows, prompts, found, strict=True):
        served = np.asarray([each.drawn for each in one.prompt_logprobs])
        error = np.abs(served - row[: len(prompt) - 1])
        assert np.median(error) < 0.02
        assert (error < 0.1).mean() > 0.95


@pytest.mark.long
def test_any_batch_split_preempted_and_cached_prefixes_give_the_same_bits():
    whole = engine(token_budget=256, use_prefix_cache=False)
    alone = [drawn(whole.generate([prompt], CONFIG))[0] for prompt in PROMPTS]
    together = engine()
    assert drawn(together.generate(PROMPTS, CONFIG)) == alone
    again = together.generate(PROMPTS, CONFIG)
    assert sum(each.num_cached for (each,) in again) > 0
    assert drawn(again) == alone
    assert drawn(together.generate([PROMPTS[1], [1, 2], *PROMPTS], CONFIG))[2:] == alone
    check_training(MODEL, PROMPTS, alone)
    few, config = (
        engine(admission="growth", num_blocks=5),
        dataclasses.replace(CONFIG, max_new_tokens=70),
    )
    assert drawn(few.generate(PROMPTS, config)) == drawn(together.generate(PROMPTS, config))
    assert few.figures().num_preemptions > 0


def test_what_it_does_not_hold_with_is_refused():
    with pytest.raises(InputError, match="block_size: given 8"):
        engine(block_size=8)
    # Without the refusal every key would be seen.
    with pytest.raises(InputError, match=r"AttentionConfig.layout: .*BatchInvariant"):
        engine(with_layout(MODEL))
    with pytest.raises(InputError, match=r"ExecutionConfig.attention: given 'reference'"):
        ExecutionConfig(strategy=STRATEGY, attention="reference")
