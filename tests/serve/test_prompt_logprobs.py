"""Log-probabilities of prompts are those of the full forward, split, cached, preempted or not."""

import jax
import numpy as np
import pytest

from jaxscale.serve.requests import Completion, RequestConfig
from jaxscale.types import InputError
from tests.serve.test_decoding import MODELS, full_logits, params_of
from tests.serve.test_engine import GREEDY, GROUPED, PROMPTS, alone, make, shared

CONFIG = RequestConfig(GREEDY, max_new_tokens=2, num_prompt_logprobs=2)


def check(prompt, found):
    logits = full_logits(MODELS[GROUPED], prompt)[:-1]
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert len(found.prompt_logprobs) == len(prompt) - 1
    for row, token, given in zip(wanted, prompt[1:], found.prompt_logprobs, strict=True):
        np.testing.assert_allclose(given.drawn, row[token], atol=2e-5)
        order = np.argsort(-row)[:2]
        assert [each for each, _ in given.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in given.top], row[order], atol=2e-5)


def test_they_are_those_of_the_full_forward_cold_and_from_cached_prefixes():
    """Prompts are split over steps of 8 tokens; the second time whole blocks are not run."""
    engine = shared()
    for _ in range(2):
        before = engine.figures()
        found = engine.generate(PROMPTS, CONFIG)
        for prompt, (one,), tokens in zip(PROMPTS, found, alone(GROUPED), strict=True):
            check(prompt, one)
            assert one.tokens == tokens[:2]
    # Of 11 and 9 tokens the first of two full blocks, of 7 none: the last one runs for its scores.
    assert engine.figures().num_cached_tokens - before.num_cached_tokens == 8
    plain = engine.generate(PROMPTS, RequestConfig(GREEDY, max_new_tokens=2))
    assert all(one.prompt_logprobs == () for (one,) in plain)


def test_a_prefix_that_was_cached_without_them_is_run_again():
    engine = shared()
    prompt = [30, 31, 32, 33, 34, 35, 36, 37, 38]
    engine.generate([prompt], RequestConfig(GREEDY, max_new_tokens=2))
    (found,) = engine.generate([prompt], CONFIG)[0]
    check(prompt, found)
    assert found.num_cached == 0


def test_of_several_sequences_the_first_has_them():
    config = RequestConfig(GREEDY, max_new_tokens=2, num_prompt_logprobs=2, num_sequences=2)
    first, second = shared().generate([PROMPTS[0]], config)[0]
    check(PROMPTS[0], first)
    assert second.prompt_logprobs == () and second.tokens == first.tokens


def test_other_weights_score_anew_what_was_scored_what_is_half_scored_and_what_is_cached():
    others = jax.tree.map(lambda leaf: leaf * 1.1, params_of(MODELS[GROUPED]))
    prompt = [*PROMPTS[0], *PROMPTS[4]]  # of 20 tokens, in three steps
    (wanted,) = make(params=others).generate([prompt], CONFIG)[0]
    engine, found = make(), Completion()
    engine.generate([prompt], CONFIG)
    engine.swap(others)
    (cached,) = engine.generate([prompt], CONFIG)[0]
    engine.swap(params_of(MODELS[GROUPED]))
    engine.add(prompt, CONFIG)
    for _ in range(2):
        assert engine.step() == []
    deltas = engine.swap(others)
    while engine.has_work:
        deltas += engine.step()
    for delta in deltas:
        found.add(delta)
    for each in (cached, found):
        drawn, expected = ([score.drawn for score in one.prompt_logprobs] for one in (each, wanted))
        np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.mark.long
def test_few_rows_and_preemption_change_nothing():
    engine = make(admission="growth", num_blocks=6, max_extra=2)
    config = RequestConfig(GREEDY, max_new_tokens=8, num_prompt_logprobs=2)
    for prompt, (found,) in zip(PROMPTS, engine.generate(PROMPTS, config), strict=True):
        check(prompt, found)
    assert engine.figures().num_preemptions > 0


def test_more_than_are_reported_are_refused():
    with pytest.raises(InputError, match="num_prompt_logprobs"):
        RequestConfig(num_prompt_logprobs=99)
