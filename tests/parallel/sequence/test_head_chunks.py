"""Heads in groups: loss and every gradient equal those of all heads at once."""

import jax
import pytest

from jaxscale.models.config.lora import LoraConfig
from jaxscale.parallel.sequence.head_chunks import HeadChunks
from jaxscale.types import InputError
from tests.parallel.comparison import (
    assert_equal_to_single_device,
    dense,
    mixture,
    on_mesh,
    single_device,
)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        pytest.param(dense(), dict(), id="dense", marks=pytest.mark.long),
        pytest.param(dense(), dict(sequence=2), id="ulysses"),
        pytest.param(mixture(num_layers=2), dict(expert=2), id="mixture", marks=pytest.mark.long),
    ],
)
def test_loss_and_every_gradient_equal_those_of_whole_layers(model, sizes):
    with jax.enable_x64(True):
        wanted = single_device(model)
        result = on_mesh(model, strategy=HeadChunks(2), remat="none", zero=3, **sizes)
        assert_equal_to_single_device(result, wanted)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"HeadChunks.num_chunks: given 3, .* but 2 % 3 = 2"):
        on_mesh(dense(), strategy=HeadChunks(3), remat="none", dtype="float32")


def test_adapters_are_refused():
    with pytest.raises(InputError, match=r"given HeadChunks\(num_chunks=2\), .* with adapters"):
        on_mesh(dense(lora=LoraConfig(2)), strategy=HeadChunks(2), remat="none", dtype="float32")
