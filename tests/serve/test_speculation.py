"""Speculation changes no token, whoever guesses, whatever the temperature and the company."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats

from jaxscale.serve.config import EngineConfig
from jaxscale.serve.drafting import Draft, NgramDrafter
from jaxscale.serve.engine import Engine
from jaxscale.serve.grammar import GrammarConfig
from jaxscale.serve.requests import Penalties, RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.serve.examples import byte_engine
from tests.serve.test_decoding import MODELS, decoder_of, full_logits, params_of
from tests.serve.test_engine import (
    GREEDY,
    GROUPED,
    NEW,
    PROMPTS,
    SMALL,
    alone,
    cache_bytes,
    tokens_of,
)

SPECULATING = SMALL | dict(num_drafts=3, token_budget=16, max_extra=16)


def make(draft=None, **changes):
    model = MODELS[GROUPED]
    config = EngineConfig(**SPECULATING | changes)
    return Engine(decoder_of(model), params_of(model), config=config, draft=draft)


def same_model():
    model = MODELS[GROUPED]
    return Draft(decoder_of(model), params_of(model))


def other_model():
    model = MODELS["dense"]
    return Draft(decoder_of(model), params_of(model))


class Planted:
    """Guesses the right tokens at first and wrong ones after a number of them."""

    def __init__(self, num_right):
        self.num_right = num_right
        prompts = map(tuple, PROMPTS)
        self.known = dict(zip(prompts, alone(GROUPED), strict=True))

    def propose(self, members, num_drafts):
        found = []
        for member in members:
            done = len(member.sequence.outputs)
            right = self.known[tuple(member.sequence.prompt)][done : done + self.num_right]
            found.append((right + [60] * num_drafts)[:num_drafts])
        return found

    def admit(self, member):
        pass


@pytest.mark.parametrize("num_right", [pytest.param(0, marks=pytest.mark.long), 2])
def test_right_drafts_save_steps_and_wrong_ones_change_nothing(num_right):
    engine = speculating(num_right)
    before = engine.figures()
    found = engine.generate(PROMPTS, RequestConfig(GREEDY, max_new_tokens=NEW))
    assert tokens_of(found) == alone(GROUPED)
    after = engine.figures()
    assert (after.num_accepted > before.num_accepted) == (num_right > 0)
    assert after.num_drafts - before.num_drafts > after.num_accepted - before.num_accepted
    assert after.num_held == 0


ENGINE = []


def speculating(num_right=2):
    """One engine, to which another drafter is given."""
    if not ENGINE:
        ENGINE.append(make())
    ENGINE[0]._drafter = Planted(num_right)
    return ENGINE[0]


def test_draws_at_any_temperature_are_those_without_speculation():
    """The same for each seed: so their distribution is the model's."""
    engine = speculating()
    for sampling in (SamplingConfig(seed=5), SamplingConfig(temperature=0.7, top_p=0.9, seed=6)):
        config = RequestConfig(sampling, max_new_tokens=NEW)
        assert tokens_of(engine.generate(PROMPTS, config)) == alone(GROUPED, sampling)


@pytest.mark.long
def test_the_second_token_is_distributed_as_the_model_says():
    """Of 512 sequences with drafts, against its exact law, summed over all first tokens."""
    model, prompt = MODELS[GROUPED], PROMPTS[1]
    engine = speculating()
    counts = np.zeros(model.vocab_size)
    before = engine.figures()
    for seed in range(4):
        config = RequestConfig(SamplingConfig(seed=seed), max_new_tokens=3, num_sequences=128)
        for each in engine.generate([prompt], config)[0]:
            counts[each.tokens[1]] += 1
    after = engine.figures()
    assert 0 < after.num_accepted - before.num_accepted < after.num_drafts - before.num_drafts

    def law(tokens):
        logits = full_logits(model, tokens)[-1].astype(np.float64)
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    firsts = law(prompt)
    wanted = sum(p * law([*prompt, token]) for token, p in enumerate(firsts)) * counts.sum()
    is_rare = wanted < 5
    observed, expected = (
        np.append(each[~is_rare], each[is_rare].sum()) for each in (counts, wanted)
    )
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.long
def test_penalised_requests_beside_speculating_ones_are_right():
    engine, plain = speculating(), RequestConfig(GREEDY, max_new_tokens=NEW)
    config = RequestConfig(GREEDY, max_new_tokens=NEW, penalties=Penalties(presence=1e4))
    requests = [engine.add(prompt, each) for prompt in PROMPTS for each in (plain, config)]
    found = {request: [] for request in requests}
    while engine.has_work:
        for delta in engine.step():
            found[delta.request] += delta.tokens
    assert [found[request] for request in requests[::2]] == alone(GROUPED)
    assert all(len(set(found[request])) == NEW for request in requests[1::2])


@pytest.mark.long
def test_drafts_are_dropped_where_a_sequence_is_preempted():
    engine = make(admission="growth", num_blocks=6)
    engine._drafter = Planted(1)
    found = engine.generate(PROMPTS, RequestConfig(GREEDY, max_new_tokens=NEW))
    assert tokens_of(found) == alone(GROUPED)
    assert engine.figures().num_preemptions > 0
    assert engine.figures().num_held == 0


@pytest.mark.long
def test_a_small_model_guesses():
    """One equal to the large model is always right, another sometimes; neither changes a token."""
    for draft, is_same in ((same_model(), True), (other_model(), False)):
        engine = make(draft)
        for sampling in (GREEDY, SamplingConfig(seed=5)):
            config = RequestConfig(sampling, max_new_tokens=NEW)
            assert tokens_of(engine.generate(PROMPTS, config)) == alone(GROUPED, sampling)
        figures = engine.figures()
        assert figures.num_drafts > 20
        assert (figures.num_accepted == figures.num_drafts) == is_same


@pytest.mark.long
def test_a_small_model_guesses_right_after_a_pause_too():
    """Its pages have gone as those of the large one have."""
    engine = make(same_model())
    config = RequestConfig(GREEDY, max_new_tokens=NEW)
    requests = [engine.add(prompt, config) for prompt in PROMPTS]
    deltas = [delta for _ in range(4) for delta in engine.step()]
    before = sum(array.nbytes for array in jax.live_arrays())
    deltas += engine.pause()
    pages = 2 * cache_bytes(GROUPED)
    assert before - sum(array.nbytes for array in jax.live_arrays()) >= pages
    engine.resume()
    while engine.has_work:
        deltas += engine.step()
    found = {request: [] for request in requests}
    for delta in deltas:
        found[delta.request] += delta.tokens
    assert list(found.values()) == alone(GROUPED)
    figures = engine.figures()
    assert figures.num_accepted == figures.num_drafts > 10


class Fixed(Planted):
    """Guesses the same text for everybody, most of which no grammar allows."""

    def __init__(self, text):
        self.text = list(text)

    def propose(self, members, num_drafts):
        return [self.text[:num_drafts] for _ in members]


def test_a_neighbours_grammar_is_not_touched_by_refused_drafts():
    sizes = dict(num_drafts=3, max_extra=16)
    plain, speculating = byte_engine(), byte_engine(**sizes)
    speculating._drafter = Fixed(b"1,2")
    patterns = ["[0-9]{6}", "[a-f]{6}", "(1,)*2", None, "[0-9],[0-9]{4}"]
    found = []
    for engine in (plain, speculating):
        texts = {}
        for number, pattern in enumerate(patterns):
            grammar = GrammarConfig("regex", pattern) if pattern else None
            sampling = SamplingConfig(seed=number)
            config = RequestConfig(sampling, max_new_tokens=8, grammar=grammar)
            texts[engine.add("ab", config)] = ""
        while engine.has_work:
            for delta in engine.step():
                texts[delta.request] += delta.text
        found.append(list(texts.values()))
    assert found[0] == found[1]
    assert speculating.figures().num_drafts > speculating.figures().num_accepted > 0


def test_the_text_itself_is_continued_where_it_repeats():
    class Text:
        def __init__(self, tokens):
            self.sequence = self
            self.tokens = tokens

        def known(self):
            return self.tokens

    drafter, text = NgramDrafter(), Text([1, 2, 3, 9, 1, 2])
    assert drafter.propose([text], 3) == [[3, 9, 1]]
    text.tokens = [1, 2, 3, 9, 1, 2, 4, 1, 2]
    assert drafter.propose([text], 2) == [[4, 1]]  # the last time counts
    assert drafter.propose([Text([5, 6, 7])], 2) == [[]]


def test_a_model_of_other_tokens_or_for_nothing_is_refused():
    with pytest.raises(InputError, match="num_drafts: given 0"):
        make(same_model(), num_drafts=0)
    other = MODELS["post norms, qk norm over all heads"]
    with pytest.raises(InputError, match="draft: given 40"):
        make(Draft(decoder_of(other), params_of(other)))
    shorter = dataclasses.replace(MODELS["dense"], max_length=31)
    with pytest.raises(InputError, match="draft: given 31, expected a model of sequences of 32"):
        make(Draft(decoder_of(shorter), params_of(shorter)))
