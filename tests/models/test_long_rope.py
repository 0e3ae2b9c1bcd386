"""LongRoPE: each document has the factors of its own length, against formulas in float64."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxscale.models.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LongRopeScaling,
    ModelConfig,
    RotaryConfig,
)
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ByChunk, ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.models.naive import Naive

L0 = 10
SCALING = LongRopeScaling(
    factors=(1.0, 1.3),
    magnitude=1.1,
    long_factors=(1.7, 5.0),
    long_magnitude=1.3,
    original_length=L0,
)
ATTENTION = AttentionConfig(4, 2, 8, rotary=RotaryConfig(100.0, fraction=0.5, scaling=SCALING))
MODEL = ModelConfig(
    vocab_size=31,
    num_layers=2,
    model_dim=16,
    max_length=40,
    pattern=(LayerConfig(ATTENTION, FeedForwardConfig(24)),),
)
DECODER = Decoder(MODEL, policy=Policy(compute="float32"), execution=ExecutionConfig(remat="none"))
LOGITS = jax.jit(DECODER.logits)


@functools.cache
def params():
    rng = np.random.default_rng(1)
    shapes = abstract_params(parameter_table(MODEL), "float32")
    draws = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * 0.3, shapes)
    return jax.device_put(draws)


def batch_of(*lengths_of_rows):
    """Rows of documents of these lengths, one after the other, and padding up to 24."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 31, (len(lengths_of_rows), 24))
    segments, positions = np.zeros((2, *tokens.shape), np.int32)
    for row, lengths in enumerate(lengths_of_rows):
        place = 0
        for number, length in enumerate(lengths, 1):
            segments[row, place : place + length] = number
            positions[row, place : place + length] = np.arange(length)
            place += length
    return {"tokens": tokens, "positions": positions, "segments": segments}


def assert_equal_where_documents_are(got, batch):
    wanted = Naive(params(), MODEL).logits(batch)
    is_token = batch["segments"] > 0
    np.testing.assert_allclose(got[is_token], wanted[is_token], atol=2e-5)


@pytest.mark.parametrize("first", [L0 - 1, L0, L0 + 1])
def test_documents_of_both_sides_share_a_batch_and_a_row(first):
    batch = batch_of((first, 4, 8), (L0 + 6,))
    assert_equal_where_documents_are(LOGITS(params(), batch)[0], batch)


def test_rows_without_segments_are_one_document():
    batch = batch_of((24,), (24,))
    got = LOGITS(params(), {name: batch[name] for name in ("tokens", "positions")})[0]
    assert_equal_where_documents_are(got, batch)


def test_layers_by_chunk_know_the_lengths_of_documents():
    execution = ExecutionConfig(remat="none", strategy=ByChunk(4))
    by_chunk = dataclasses.replace(DECODER, execution=execution)
    batch = batch_of((L0 + 2, 4), (5,))
    assert_equal_where_documents_are(jax.jit(by_chunk.logits)(params(), batch)[0], batch)


def test_decoding_across_the_original_length_is_a_full_recompute():
    """Rows cross at different steps, and one ends before it would."""
    prompts = [list(range(3, 3 + length)) for length in (L0 - 4, L0 - 1, L0 + 3, 2)]
    got = generate_tokens(
        DECODER,
        params(),
        prompts,
        sampling=SamplingConfig(temperature=0.0),
        max_new_tokens=8,
    )
    naive = Naive(params(), MODEL)
    for prompt, continuation in zip(prompts, got, strict=True):
        text = list(prompt)
        for token in continuation:
            length = len(text)
            row = np.array(text), np.arange(length), np.ones(length, int)
            assert naive.row(*row)[-1].argmax() == token
            text.append(token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"long_factors": (1.0,)}, "LongRopeScaling.long_factors: given '1 factors', expected 2"),
        ({"long_factors": ()}, "LongRopeScaling.original_length: given 10"),
        ({"original_length": None}, "LongRopeScaling.original_length: given None"),
        ({"long_magnitude": 0.0}, "LongRopeScaling.long_magnitude"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SCALING, **change)
