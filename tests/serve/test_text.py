"""Streamed text adds up to the whole, and ends before a stop text."""

import random

import pytest
import tokenizers

from jaxscale.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from jaxscale.serve.text import TextStream


def byte_pairs():
    """A byte-level tokenizer with a few merges, so that tokens begin and end within characters."""
    text = ["ein Beispiel – größer, 日本語, naïve 😀😀", "for x in range(10): print(x)"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str())


TOKENIZERS = {"bytes": ByteTokenizer(), "byte pairs": byte_pairs()}


def stream(tokenizer, tokens, stop=()):
    """(pieces, whether a stop text was found)."""
    text = TextStream(tokenizer, stop)
    pieces = [text.add(token) for token in tokens]
    return [*pieces, text.flush()], text.is_stopped


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_add_up_to_the_text(name):
    tokenizer = TOKENIZERS[name]
    text = "größer – 日本語 😀 naïve\n\nprint(x)  ende"
    pieces, _ = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces), "a part of a character was given out"
    assert sum(map(bool, pieces)) > 10, "text comes as soon as it is known"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_random_tokens_add_up_too(name):
    tokenizer, rng = TOKENIZERS[name], random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(1, 256) for _ in range(rng.randrange(1, 30))]
        pieces, _ = stream(tokenizer, tokens)
        assert "".join(pieces) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", (" three",), "one two"),
        ("one two three", ("two", "one t"), ""),
        ("aab aaab", ("aaab",), "aab "),
        ("ends with sto", ("stop",), "ends with sto"),
        ("nothing of it", ("x", "yes"), "nothing of it"),
    ],
)
def test_text_ends_before_a_stop_text(text, stop, wanted):
    """Whatever the tokens; and nothing of the stop text has been given out before it was whole."""
    for tokenizer in TOKENIZERS.values():
        pieces, is_stopped = stream(tokenizer, tokenizer.encode(text), stop)
        assert "".join(pieces) == wanted
        assert is_stopped == (wanted != text)


def test_what_cannot_become_a_stop_text_is_not_held_back():
    text = TextStream(ByteTokenizer(), ("stop",))
    assert [text.add(token) for token in b"ssto!"] == ["", "s", "", "", "sto!"]
