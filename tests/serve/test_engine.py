"""The engine's tokens are those of `generate_tokens`, whatever runs beside a sequence."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.engine import Engine, EngineConfig
from jaxscale.serve.requests import Completion, Penalties, RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.serve.sequences import FinishReason
from jaxscale.types import InputError
from tests.models import test_long_rope as long_rope
from tests.serve.test_decoding import MODELS, decoder_of, full_logits, params_of, with_layout

GREEDY = SamplingConfig(temperature=0)
SMALL = dict(token_budget=8, max_sequences=4, block_size=4, max_prompts=3, num_blocks=32)
# Prompts of several lengths, of which some share a beginning and some are split over steps.
PROMPTS = [[7, 3, 9, 37, 1, 5, 5, 2, 40, 11, 3], [5], [7, 3, 9, 37, 1, 8, 8], [2, 2, 8], [60] * 9]
NEW = 8
GROUPED = "grouped queries, window, qk norm"


def make(name=GROUPED, params=None, **changes):
    model, config = MODELS[name], EngineConfig(**SMALL | changes)
    return Engine(decoder_of(model), params or params_of(model), config=config)


def prompts_of(name):
    """PROMPTS, as far as they fit the model."""
    model = MODELS[name]
    cut = [prompt[: model.max_length - NEW] for prompt in PROMPTS]
    return [[token % model.vocab_size for token in prompt] for prompt in cut]


@functools.cache
def alone(name, sampling=GREEDY, index=0):
    """What `generate_tokens` continues each prompt with, which is the same in any batch of it."""
    settings = dict(sampling=sampling, max_new_tokens=NEW, sequences=[index] * len(PROMPTS))
    model = MODELS[name]
    return generate_tokens(decoder_of(model), params_of(model), prompts_of(name), **settings)


def tokens_of(completions):
    return [each.tokens for (each,) in completions]


@functools.cache
def shared(name=GROUPED):
    """One engine for tests that leave it without work."""
    return make(name, steps_a_launch=2)


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(GROUPED, {}, id="split and fused"),
        pytest.param(GROUPED, dict(token_budget=64, max_sequences=8), id="unsplit"),
        pytest.param(GROUPED, dict(admission="growth", num_blocks=6), id="preempted"),
        pytest.param(GROUPED, dict(policy="prefill_first"), id="baseline"),
        pytest.param(
            GROUPED,
            dict(max_sequences=8, steps_a_launch=4, admission="growth"),
            id="several steps a launch, in which some stand still",
        ),
        pytest.param("experts with prefix, window", {}, id="experts"),
        pytest.param("learned positions, layernorm", {}, id="learned", marks=LONG),
        pytest.param("post norms, qk norm over all heads", {}, id="post", marks=LONG),
        pytest.param("side by side, partial rotary", {}, id="side by side", marks=LONG),
    ],
)
def test_greedy_tokens_are_those_of_a_sequence_alone(name, changes):
    engine = make(name, **changes)
    config = RequestConfig(GREEDY, max_new_tokens=NEW)
    found = tokens_of(engine.generate(prompts_of(name), config))
    assert found == alone(name)
    assert (engine.figures().num_preemptions > 0) == ("num_blocks" in changes)
    assert engine.figures().num_held == 0


@pytest.mark.parametrize("steps_a_launch", [1, 4])
def test_a_sequence_that_outgrows_longropes_first_factors_is_computed_again_with_the_others(
    steps_a_launch,
):
    """Beside one that does not, one that was longer from the start, and an equal prefix."""
    prompts = [[7, 3, 9, 30, 1, 5], [7, 3, 9, 30], [7, 3, 9, 30, 1, 5, 5, 2, 4, 11, 3, 8]]
    config = RequestConfig(GREEDY, max_new_tokens=NEW, num_logprobs=0)

    def make(**changes):
        sizes = EngineConfig(**SMALL | changes)
        return Engine(long_rope.DECODER, long_rope.params(), config=sizes)

    settings = dict(sampling=GREEDY, max_new_tokens=NEW)
    wanted = generate_tokens(long_rope.DECODER, long_rope.params(), prompts, **settings)
    alone = make(use_prefix_cache=False)
    scores = [logprobs_of(alone.generate([each], config)) for each in prompts]
    engine = make(steps_a_launch=steps_a_launch)
    for _ in range(2):
        found = engine.generate(prompts, config)
        assert tokens_of(found) == wanted
        for (each,), score in zip(found, scores, strict=True):
            np.testing.assert_allclose(logprobs_of([[each]]), score, atol=1e-5)
    assert engine.figures().num_preemptions == 4


def test_at_longropes_original_length_log_probabilities_are_those_of_the_forward():
    """Prompts that are split, shorter by one, as long, and longer by one; and what follows them."""
    prompts = [[(5 * i + n) % 31 for i in range(long_rope.L0 + n)] for n in (-1, 0, 1)]
    config = RequestConfig(GREEDY, max_new_tokens=3, num_logprobs=0, num_prompt_logprobs=0)
    engine = Engine(long_rope.DECODER, long_rope.params(), config=EngineConfig(**SMALL))
    for prompt, (one,) in zip(prompts, engine.generate(prompts, config), strict=True):
        of_prompt = log_probabilities(prompt)[range(len(prompt) - 1), prompt[1:]]
        drawn = [
            log_probabilities(prompt + one.tokens[:i])[-1, token]
            for i, token in enumerate(one.tokens)
        ]
        found = [each.drawn for each in (*one.prompt_logprobs, *one.logprobs)]
        np.testing.assert_allclose(found, [*of_prompt, *drawn], atol=1e-5)


def log_probabilities(text):
    """[T, V] of one text by the full forward."""
    row = np.pad(text, (0, 16 - len(text)))[None]
    batch = {"tokens": row, "positions": np.arange(16)[None]}
    batch["segments"] = (batch["positions"] < len(text)).astype(np.int32)
    logits = long_rope.LOGITS(long_rope.params(), batch)[0][0, : len(text)]
    return np.asarray(jax.nn.log_softmax(logits))


def logprobs_of(completions):
    return [[each.drawn for each in one.logprobs] for (one,) in completions]


def test_each_head_sees_the_blocks_of_its_layout():
    """In prompts that are split and whole, and in decoding."""
    model = with_layout(dataclasses.replace(MODELS["dense"], max_length=320))
    sizes = dict(token_budget=96, max_sequences=4, max_prompts=4, num_blocks=20)
    engine = Engine(decoder_of(model), params_of(model), config=EngineConfig(**sizes))
    prompts = [np.random.default_rng(0).integers(0, 61, num).tolist() for num in (260, 5, 130)]
    found = tokens_of(engine.generate(prompts, RequestConfig(GREEDY, max_new_tokens=NEW)))
    for prompt, tokens in zip(prompts, found, strict=True):
        places = slice(len(prompt) - 1, -1)
        sparse, dense = (
            full_logits(each, [*prompt, *tokens])[places].argmax(-1).tolist()
            for each in (model, dataclasses.replace(MODELS["dense"], max_length=320))
        )
        assert tokens == sparse
        assert len(prompt) == 5 or tokens != dense


def test_a_cached_prefix_changes_nothing_and_is_counted():
    engine, config = shared(), RequestConfig(GREEDY, max_new_tokens=NEW)
    engine.generate(PROMPTS, config)
    before = engine.figures()
    again = engine.generate(PROMPTS, config)
    assert tokens_of(again) == alone(GROUPED)
    assert [each.num_cached for (each,) in again] == [8, 0, 4, 0, 8]
    after = engine.figures()
    assert after.num_cached_tokens - before.num_cached_tokens == 20
    assert after.num_prompt_tokens - before.num_prompt_tokens == sum(map(len, PROMPTS))


def test_rows_of_padding_write_to_the_page_of_padding_alone():
    """A step of one sequence, padded to more: of the live pages one slot a layer changes."""
    engine = shared()
    engine.generate([[50, 51, 52]], RequestConfig(GREEDY, max_new_tokens=1))
    engine.add([50, 51, 52], RequestConfig(GREEDY, max_new_tokens=2))
    engine.step()
    before = [np.array(leaf) for leaf in jax.tree.leaves(engine._runner._caches)]  # copies
    engine.step()
    after = [np.array(leaf) for leaf in jax.tree.leaves(engine._runner._caches)]
    for old, new in zip(before, after, strict=True):
        changed = (old != new).any((2, 3))
        assert changed[1:].sum() == 1
    while engine.has_work:
        engine.step()


@pytest.mark.long
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_prefixes_come_back_from_the_hosts_memory_and_not_after_other_weights(dtype):
    """12 blocks, so that what other prompts hold has to go."""
    engine = make(num_blocks=12, max_sequences=2, host_bytes=2**20, cache_dtype=dtype)
    config = RequestConfig(GREEDY, max_new_tokens=4)
    prompts = [[number] * 9 for number in range(6)]
    first = tokens_of(engine.generate(prompts, config))
    assert engine.figures().num_spilled > 0
    again = engine.generate(prompts, config)
    assert tokens_of(again) == first
    assert [one.num_cached for (one,) in again] == [8] * 6
    engine.swap(params_of(MODELS[GROUPED]))
    assert engine.figures().num_spilled == 0
    anew = engine.generate(prompts[:1], config)
    assert (anew[0][0].tokens, anew[0][0].num_cached) == (first[0], 0)


def test_draws_are_those_of_the_seed_in_any_company():
    engine = shared()
    samplings = [SamplingConfig(seed=5), SamplingConfig(temperature=0.7, top_p=0.9, seed=6)]
    requests = {}
    for sampling in samplings:
        config = RequestConfig(sampling, max_new_tokens=NEW, num_sequences=2)
        for number, prompt in enumerate(PROMPTS):
            requests[engine.add(prompt, config)] = (sampling, number)
    found = {}
    while engine.has_work:
        for delta in engine.step():
            found.setdefault((delta.request, delta.index), []).extend(delta.tokens)
    for (request, index), tokens in found.items():
        sampling, number = requests[request]
        assert tokens == alone(GROUPED, sampling, index)[number]


def test_what_arrives_later_and_what_is_cancelled_leaves_the_others_alone():
    """At every step one comes, and one goes whatever its state."""
    engine, config = shared(), RequestConfig(GREEDY, max_new_tokens=NEW)
    kept, doomed, found = {}, [], {}
    for step in range(40):
        if step < 20:
            kept[engine.add(PROMPTS[step % 5], config)] = step % 5
            doomed.append(engine.add(PROMPTS[(step + 2) % 5], config))
        if step % 3 and doomed:
            engine.cancel(doomed.pop(step % len(doomed)))
        for delta in engine.step():
            found.setdefault(delta.request, Completion()).add(delta)
    for request in doomed:
        engine.cancel(request)
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request, Completion()).add(delta)
    for request, number in kept.items():
        assert found[request].tokens == alone(GROUPED)[number]
        assert found[request].finish_reason is FinishReason.LENGTH
    assert engine.figures().num_held == 0


def test_a_stop_token_ends_a_sequence_and_what_was_launched_behind_it_is_dropped():
    stop = alone(GROUPED)[0][3]
    config = RequestConfig(GREEDY, max_new_tokens=NEW, stop_ids=(stop,))
    (found,) = shared().generate(PROMPTS[:1], config)[0]
    assert found.tokens == alone(GROUPED)[0][: alone(GROUPED)[0].index(stop) + 1]
    assert found.finish_reason is FinishReason.STOP
    assert not shared().has_work


@pytest.mark.parametrize("is_preempted", [False, True])
def test_penalties_take_the_token_drawn_last_into_account(is_preempted):
    """A presence penalty larger than any logit lets no token come twice, in any step."""
    config = RequestConfig(GREEDY, max_new_tokens=16, penalties=Penalties(presence=1e4))
    plain = RequestConfig(GREEDY, max_new_tokens=16)
    engine = make(admission="growth", num_blocks=8) if is_preempted else shared()
    before = engine.figures().num_preemptions
    requests = [engine.add(prompt, each) for prompt in PROMPTS for each in (config, plain)]
    found = {request: [] for request in requests}
    while engine.has_work:
        for delta in engine.step():
            found[delta.request] += delta.tokens
    penalised, free = (list(found.values())[first::2] for first in (0, 1))
    assert all(len(set(tokens)) == 16 for tokens in penalised)
    assert (engine.figures().num_preemptions > before) == is_preempted
    assert [tokens[:NEW] for tokens in free] == alone(GROUPED)


@pytest.mark.parametrize(
    ("sampling", "penalties"),
    [
        (GREEDY, Penalties()),
        (SamplingConfig(temperature=3.0, top_k=9), Penalties(presence=2.0, repetition=3.0)),
    ],
    ids=["greedy", "drawn otherwise"],
)
def test_log_probabilities_are_those_of_the_full_forward(sampling, penalties):
    """The model's own, whatever else decides what is drawn."""
    config = RequestConfig(sampling, max_new_tokens=4, num_logprobs=3, penalties=penalties)
    for prompt, (found,) in zip(PROMPTS, shared().generate(PROMPTS, config), strict=True):
        logits = full_logits(MODELS[GROUPED], [*prompt, *found.tokens])[len(prompt) - 1 : -1]
        wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, token, given in zip(wanted, found.tokens, found.logprobs, strict=True):
            order = np.argsort(-row)[:3]
            assert [each for each, _ in given.top] == order.tolist()
            np.testing.assert_allclose([value for _, value in given.top], row[order], atol=2e-5)
            np.testing.assert_allclose(given.drawn, row[token], atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_cache_of_8_bits_changes_log_probabilities_a_little(dtype):
    """The same tokens, for they are given; split, shared and preempted as ever."""
    config = RequestConfig(GREEDY, max_new_tokens=1, num_prompt_logprobs=0)
    engine = make(cache_dtype=dtype, admission="growth", num_blocks=6)
    pairs = zip(engine.generate(PROMPTS, config), shared().generate(PROMPTS, config), strict=True)
    for (one,), (exact,) in pairs:
        found, wanted = (
            np.asarray([each.drawn for each in which.prompt_logprobs]) for which in (one, exact)
        )
        np.testing.assert_allclose(found, wanted, atol=0.3)
        assert not len(wanted) or np.abs(found - wanted).mean() < 0.08


def test_other_weights_take_over_in_the_middle_and_no_cached_prefix_of_the_old_is_used():
    engine = make(steps_a_launch=1)  # of several the old weights might draw all tokens
    config = RequestConfig(GREEDY, max_new_tokens=NEW)
    request, found = engine.add(PROMPTS[0], config), []
    while len(found) < 3:
        found += [token for delta in engine.step() for token in delta.tokens]
    others = jax.tree.map(lambda leaf: leaf * 1.1, params_of(MODELS[GROUPED]))
    versions = []
    found += [token for delta in engine.swap(others) for token in delta.tokens]
    num_old = len(found)
    while engine.has_work:
        for delta in engine.step():
            found += delta.tokens
            versions.append(delta.weights_version)
    run = functools.partial(generate_tokens, decoder_of(MODELS[GROUPED]), sampling=GREEDY)
    rest = run(others, [PROMPTS[0] + found[:num_old]], max_new_tokens=NEW - num_old)[0]
    assert found == alone(GROUPED)[0][:num_old] + rest
    assert set(versions) == {1}
    (again,) = engine.generate([PROMPTS[0]], config)[0]
    assert again.tokens == run(others, [PROMPTS[0]], max_new_tokens=NEW)[0]
    assert request == 0


def test_weights_of_another_model_are_refused_and_the_engine_goes_on():
    engine, config = make(), RequestConfig(GREEDY, max_new_tokens=NEW)
    wrong = params_of(MODELS["dense"])
    for given in (wrong, jax.tree.map(lambda leaf: leaf[..., :1], params_of(MODELS[GROUPED]))):
        with pytest.raises(InputError, match="as the engine has it"):
            engine.swap(given)
    assert tokens_of(engine.generate(PROMPTS, config)) == alone(GROUPED)
    assert engine.figures().weights_version == 0


def test_a_pause_gives_the_cache_back_and_what_ran_goes_on_after_it():
    engine, config = shared(), RequestConfig(GREEDY, max_new_tokens=NEW)
    requests, found = [engine.add(prompt, config) for prompt in PROMPTS], {}

    def take(deltas):
        for delta in deltas:
            found.setdefault(delta.request, []).extend(delta.tokens)

    for _ in range(5):
        take(engine.step())
    before = sum(array.nbytes for array in jax.live_arrays())
    take(engine.pause())
    assert before - sum(array.nbytes for array in jax.live_arrays()) >= cache_bytes(GROUPED)
    assert not engine.has_work and engine.step() == []
    with pytest.raises(InputError, match="comes before generate"):
        engine.generate(PROMPTS, config)
    engine.resume()
    while engine.has_work:
        take(engine.step())
    assert [found[request] for request in requests] == alone(GROUPED)


def cache_bytes(name):
    """Of float32 keys and values."""
    heads = [layer.attention for layer in MODELS[name].layers]
    width = sum(each.num_kv_heads * each.head_dim for each in heads)
    return 2 * 4 * SMALL["num_blocks"] * SMALL["block_size"] * width


def test_how_long_a_request_waited_for_its_first_step_is_told():
    now, model = [0.0], MODELS[GROUPED]
    sizes = EngineConfig(**SMALL | dict(max_sequences=1, admission="growth"))
    engine = Engine(decoder_of(model), params_of(model), config=sizes, clock=lambda: now[0])
    config = RequestConfig(GREEDY, max_new_tokens=3)
    first, second = engine.add(PROMPTS[1], config), engine.add(PROMPTS[3], config)
    waited = {}
    while engine.has_work:
        now[0] += 1.0
        for delta in engine.step():
            waited.setdefault(delta.request, set()).add(delta.waited_s)
    # Three steps of the first come before; what its last one draws is collected in the fourth.
    assert waited[first] == {1.0} and len(waited[second]) == 1
    assert waited[second].pop() >= 4.0


def test_a_request_times_out_wherever_it_is():
    now = [0.0]
    model = MODELS[GROUPED]
    engine = Engine(
        decoder_of(model),
        params_of(model),
        config=EngineConfig(**SMALL),
        clock=lambda: now[0],
    )
    config = RequestConfig(GREEDY, max_new_tokens=NEW, timeout_s=5.0)
    for prompt in PROMPTS * 2:
        engine.add(prompt, config)
    deltas = [delta for _ in range(4) for delta in engine.step()]
    now[0] = 6.0
    while engine.has_work:
        deltas += engine.step()
    ends = [delta.finish_reason for delta in deltas if delta.finish_reason]
    assert ends == [FinishReason.TIMEOUT] * 10
    engine.generate(PROMPTS[1:2], config)
    now[0] = 12.0  # past the deadline of what has ended, for which nobody has to be woken
    assert engine.wait_s() == np.inf and not engine.has_work
    engine.pause()
    engine.add(PROMPTS[1], config)
    engine.step()
    assert engine.wait_s() == 5.0 and not engine.has_work
    now[0] = 17.0
    assert engine.has_work and engine.step()[0].finish_reason is FinishReason.TIMEOUT
    assert not engine.has_work and engine.wait_s() == np.inf
    assert engine.figures().num_held == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([61], "0 <= token < vocab_size = 61"),
        ([1] * 30, "<= model.max_length = 32, here 30"),
        ([1] * 20, "blocks needed <= blocks, here 7 <= 6"),
    ],
)
def test_bad_prompts_are_refused_and_the_engine_goes_on(prompt, message):
    engine, config = small_cache(), RequestConfig(GREEDY, max_new_tokens=NEW)
    with pytest.raises(InputError, match=message):
        engine.generate([PROMPTS[1], prompt], config)
    assert not engine.has_work
    assert tokens_of(engine.generate(PROMPTS[1:2], config)) == alone(GROUPED)[1:2]


@functools.cache
def small_cache():
    return make(num_blocks=6)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="max_sequences <= token_budget = 8"):
        EngineConfig(token_budget=8, max_sequences=9)
    with pytest.raises(InputError, match="memory_fraction"):
        EngineConfig(memory_fraction=1.5)
