"""Continuations follow their grammars, and their neighbours do not."""

import concurrent.futures
import dataclasses
import functools
import json
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.drawing import only_allowed
from jaxscale.serve.engine import Engine
from jaxscale.serve.grammar import GrammarConfig, Grammars, choice_grammar, json_grammar
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.serve.examples import BYTE_MODEL, SIZES, byte_decoder, byte_engine, byte_params
from tests.serve.test_text import TOKENIZERS

pytest.importorskip("llguidance", reason="the extra `serve`")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
LARGE = GrammarConfig("regex", "a{1,100}")


@functools.cache
def engine():
    return byte_engine()


def draws(seed, grammar, **fields):
    sampling = SamplingConfig(seed=seed)
    return RequestConfig(sampling, max_new_tokens=60, grammar=grammar, **fields)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_mask_allows_what_the_grammar_does(name):
    tokenizer = TOKENIZERS[name]
    matcher = Grammars(tokenizer).begin(GrammarConfig("regex", "(ab|ac)+"))
    for token in tokenizer.encode("abac"):
        assert is_allowed(matcher.mask(), token)
        matcher.accept(token)
    allowed = [token for token in range(tokenizer.vocab_size) if is_allowed(matcher.mask(), token)]
    assert tokenizer.eos_id in allowed
    texts = {tokenizer.decode([token]) for token in allowed if token != tokenizer.eos_id}
    assert texts and all(text.startswith("a") for text in texts)


def is_allowed(mask, token):
    return bool(mask[token // 32] >> (token % 32) & 1)


def test_masks_of_rows_keep_their_own_tokens():
    logits = np.zeros((2, 70), np.float32)
    masks = np.full((2, 3), -1, np.int32)
    masks[1] = [0, -(2**31), 2]  # the highest bit is the sign
    found = np.asarray(jax.jit(only_allowed)(logits, masks))
    assert np.isfinite(found[0]).all()
    assert np.flatnonzero(np.isfinite(found[1])).tolist() == [63, 65]


def test_each_sequence_follows_its_own_grammar_beside_others_without():
    """A random model; grammars that end by themselves, and draws that differ."""
    grammars = [
        json_grammar(SCHEMA),
        GrammarConfig("regex", "[0-9]{3}-[a-f]+x"),
        choice_grammar(["yes", "no", 'may"be']),
        None,
    ]
    asked = {}
    for seed in range(3):
        for grammar in grammars:
            asked[engine().add("some text", draws(seed, grammar, num_sequences=2))] = grammar
    found = {}
    while engine().has_work:
        for delta in engine().step():
            text, _ = found.get((delta.request, delta.index), ("", None))
            found[delta.request, delta.index] = text + delta.text, delta.finish_reason
    for (request, _), (text, reason) in found.items():
        grammar = asked[request]
        if grammar is None:
            assert not text.startswith(("{", "yes", "no"))
        elif grammar.kind == "json_schema":
            if reason == "stop":
                assert set(json.loads(text)) == {"a", "b"}
        elif grammar.kind == "regex":
            pattern = grammar.text if reason == "stop" else "[0-9]{3}-[a-f]+"
            assert re.fullmatch(pattern, text)
        else:
            assert (text, reason) in [("yes", "stop"), ("no", "stop"), ('may"be', "stop")]
    assert len({text for text, _ in found.values()}) > 12


def test_greedy_neighbours_are_as_without_a_grammar_beside_them():
    greedy = RequestConfig(SamplingConfig(temperature=0), max_new_tokens=20)
    alone = engine().generate(["def f"], greedy)[0][0].tokens
    number = engine().add("def f", greedy)
    engine().add("x", draws(0, json_grammar(SCHEMA)))
    found = []
    while engine().has_work:
        found += [each.tokens for each in engine().step() if each.request == number]
    assert [token for tokens in found for token in tokens] == alone


@pytest.mark.parametrize("prompt", ["def f", "a prompt of more than one piece"])
def test_the_first_token_behind_a_prompt_that_is_scored_follows_the_grammar(prompt):
    """Its row comes behind those of the prompt's tokens, of which the first had its mask."""
    greedy, grammar = SamplingConfig(temperature=0), GrammarConfig("regex", "[0-9]{3}")
    plain = RequestConfig(greedy, max_new_tokens=9, grammar=grammar)
    scored = dataclasses.replace(plain, num_prompt_logprobs=1)
    (found,), (wanted,) = (engine().generate([prompt], each)[0] for each in (scored, plain))
    assert re.fullmatch("[0-9]{3}", found.text) and found.tokens == wanted.tokens


@pytest.mark.parametrize(
    ("forbidden", "text", "reason"),
    [(b"0123456789", "", "length"), (b"012345678", "999", "stop"), ([256], "999", "length")],
)
def test_where_the_head_forbids_all_that_a_grammar_allows_the_text_ends(forbidden, text, reason):
    """A token was drawn that the grammar forbids; 256 is the end of a text."""
    bias = np.zeros(258, np.float32)
    bias[[*forbidden]] = -np.inf
    bias[ord("9")] += 100
    params = byte_params()
    params = params | {"head": params["head"] | {"bias": jnp.asarray(bias)}}
    model = dataclasses.replace(BYTE_MODEL, use_head_bias=True)
    decoder = dataclasses.replace(byte_decoder(), config=model)
    engine = Engine(decoder, params, config=EngineConfig(**SIZES), tokenizer=ByteTokenizer())
    asked = RequestConfig(SamplingConfig(), 9, grammar=GrammarConfig("regex", "[0-9]{3}"))
    (found,) = engine.generate(["x"], asked)[0]
    assert (found.text, found.finish_reason) == (text, reason)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (GrammarConfig("regex", "(a"), "a regex that can be compiled"),
        (GrammarConfig("lark", "nonsense ::"), "a lark that can be compiled"),
        (GrammarConfig("json_schema", "{"), "JSON"),
        (json_grammar({"type": "nonsense"}), "a json_schema that can be compiled"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_and_the_engine_goes_on(grammar, message):
    with pytest.raises(InputError, match=message):
        engine().add("x", draws(0, grammar))
    assert not engine().has_work


def test_nobody_waits_for_anothers_grammar_and_each_is_compiled_once(monkeypatch):
    grammars, is_told, compiled = Grammars(ByteTokenizer()), threading.Event(), []
    compile_one = grammars._compile

    def slow(config):
        compiled.append(config)
        if config == LARGE:
            is_told.wait(30)
        return compile_one(config)

    monkeypatch.setattr(grammars, "_compile", slow)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        large = [threads.submit(grammars.begin, LARGE) for _ in range(2)]
        while not compiled:
            time.sleep(0.001)
        small = threads.submit(grammars.begin, GrammarConfig("regex", "b")).result(20)
        assert small.mask()[ord("b") // 32] == 1 << ord("b") % 32
        assert not any(each.done() for each in large)
        is_told.set()
        assert all(each.result(20).mask().any() for each in large)
    assert compiled.count(LARGE) == 1


def test_a_compiler_that_breaks_down_leaves_nobody_waiting(monkeypatch):
    """A panic of a library in Rust is no Exception; the grammar is compiled anew when asked for."""

    class Panic(BaseException):
        pass

    def panics(_):
        raise Panic

    grammars, config = Grammars(ByteTokenizer()), GrammarConfig("regex", "a+")
    with monkeypatch.context() as patched, pytest.raises(Panic):
        patched.setattr(grammars, "_compile", panics)
        grammars.begin(config)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(grammars.begin, config).result(timeout=60)
