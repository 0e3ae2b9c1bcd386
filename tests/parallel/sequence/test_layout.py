"""Layouts of tokens: what moves with a token, a zigzag's balance, lengths that do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.parallel.mesh import SEQUENCE, MeshConfig, make_mesh
from jaxscale.parallel.sequence.layout import (
    Chunked,
    Contiguous,
    Zigzag,
    chunk_order,
    zigzag_order,
)
from jaxscale.types import InputError

T = 32


def placed(layout, tokens):
    """Tokens and weights after `place`, on four shards."""
    mesh = make_mesh(MeshConfig(sequence=4, ring=2), jax.devices()[:4])
    share = P(None, SEQUENCE)
    place = jax.shard_map(layout.place, mesh=mesh, in_specs=share, out_specs=share, check_vma=False)
    return jax.jit(place)({"tokens": tokens, "weights": tokens / 2})


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        pytest.param(Contiguous(), np.arange(T), id="contiguous"),
        pytest.param(Zigzag(2), zigzag_order(T, 2), id="zigzag of 2"),
        pytest.param(Zigzag(4), zigzag_order(T, 4), id="zigzag of 4"),
        pytest.param(Chunked(8), chunk_order(T, 4, 4, 1), id="chunks of 8"),
    ],
)
def test_all_that_is_kept_for_a_token_moves_with_it(layout, order):
    tokens = jnp.arange(2 * T).reshape(2, T)
    found = placed(layout, tokens)
    np.testing.assert_array_equal(found["tokens"], tokens[:, order])
    np.testing.assert_array_equal(found["weights"], found["tokens"] / 2)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_chunk_s_shares_are_consecutive_tokens(tensor):
    """Of 32 tokens in 4 chunks, as the 2 shards' members have them one after the other."""
    by_member = chunk_order(T, 4, 2, tensor).reshape(2 * tensor, 4, -1)
    for number in range(4):
        assert by_member[:, number].reshape(-1).tolist() == list(range(8 * number, 8 * number + 8))


def test_every_member_has_as_much_to_look_at():
    assert zigzag_order(16, 2).tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
    by_member = zigzag_order(64, 4).reshape(4, -1)
    num_visible = [(tokens + 1).sum() for tokens in by_member]  # keys up to each query
    assert len(set(num_visible)) == 1


@pytest.mark.parametrize(("length", "nearest"), [(30, "28 or 32"), (3, "nearest: 4")])
def test_a_zigzag_that_does_not_divide_is_refused(length, nearest):
    with pytest.raises(InputError, match=nearest):
        zigzag_order(length, 2)
