"""Packing: every token once, labels, positions and segments as a loop over documents gives them."""

import numpy as np
import pytest

from jaxscale.data.packing import concatenate_rows, pack_rows, read_rows

T = 16
PLANS = {True: pack_rows, False: concatenate_rows}


@pytest.fixture(scope="module")
def corpus():
    """200 documents of 1 to 60 tokens, with gaps between them; each token is its own index."""
    generator = np.random.default_rng(0)
    lengths = np.concatenate([generator.integers(1, 60, 197), [T, 2 * T, 1]])
    offsets = np.cumsum(lengths + 3) - lengths
    return np.arange(offsets[-1] + lengths[-1]), offsets, lengths


def all_rows(corpus, is_packed):
    tokens, offsets, lengths = corpus
    packing = PLANS[is_packed](offsets, lengths, T)
    return packing, read_rows(tokens, packing, np.arange(packing.num_rows), is_packed=is_packed)


def naive_row(pieces, tokens, is_packed):
    """One row, token by token; pieces are (start, length, is_last)."""
    row = {name: [] for name in ("tokens", "labels", "weights", "segments", "positions")}
    for segment, (start, length, is_last) in enumerate(pieces, 1):
        for place in range(start, start + length):
            ends = is_last and place == start + length - 1
            row["positions"].append(place - start if is_packed else len(row["tokens"]))
            row["segments"].append(segment if is_packed else 1)
            row["tokens"].append(tokens[place])
            row["labels"].append(0 if ends else tokens[place + 1])
            row["weights"].append(0 if ends else 1)
    return {name: values + [0] * (T - len(values)) for name, values in row.items()}


@pytest.mark.parametrize("is_packed", [True, False])
def test_rows_are_those_of_a_naive_loop(corpus, is_packed):
    packing, rows = all_rows(corpus, is_packed)
    for number in range(packing.num_rows):
        pieces = slice(packing.row_offsets[number], packing.row_offsets[number + 1])
        in_row = zip(packing.starts[pieces], packing.lengths[pieces], packing.is_last[pieces])
        expected = naive_row(in_row, corpus[0], is_packed)
        assert {name: values[number].tolist() for name, values in rows.items()} == expected


@pytest.mark.parametrize("is_packed", [True, False])
def test_every_token_once_and_every_successor_predicted_once(corpus, is_packed):
    _, offsets, lengths = corpus
    _, rows = all_rows(corpus, is_packed)
    documents = [np.arange(o, o + n) for o, n in zip(offsets, lengths, strict=True)]
    successors = [document[1:] for document in documents]
    has_label = rows["weights"] > 0
    assert sorted(rows["tokens"][rows["segments"] > 0]) == np.concatenate(documents).tolist()
    assert sorted(rows["labels"][has_label]) == np.concatenate(successors).tolist()
    assert (rows["labels"][has_label] == rows["tokens"][has_label] + 1).all()


def test_packed_rows_are_nearly_full(corpus):
    packing, rows = all_rows(corpus, True)
    assert packing.num_rows <= np.ceil(corpus[2].sum() / T) + 1
    assert rows["positions"].max() < T


def naive_best_fit(sizes):
    """Longest first, each into the fullest row that has space."""
    space = []
    for size in sorted(sizes, reverse=True):
        fits = [row for row, left in enumerate(space) if left >= size]
        if not fits:
            space.append(T)
            fits = [len(space) - 1]
        space[min(fits, key=lambda row: space[row])] -= size
    return sorted(space)


@pytest.mark.parametrize("seed", range(5))
def test_packs_as_best_fit_decreasing_does(seed):
    lengths = np.random.default_rng(seed).integers(1, T + 1, 150)
    packing = pack_rows(np.cumsum(lengths) - lengths, lengths, T)
    used = np.add.reduceat(packing.lengths, packing.row_offsets[:-1])
    assert sorted(T - used) == naive_best_fit(lengths)


def test_many_pieces_are_packed_in_seconds():
    lengths = np.random.default_rng(0).integers(1, 5000, 300_000)
    packing = pack_rows(np.cumsum(lengths) - lengths, lengths, 4096)
    assert packing.num_rows < lengths.sum() / 4096 * 1.01


def test_padding_rows_are_zero(corpus):
    tokens, offsets, lengths = corpus
    packing = pack_rows(offsets, lengths, T)
    rows = read_rows(tokens, packing, np.array([-1, 0, -1]), is_packed=True)
    assert all(not values[[0, 2]].any() for values in rows.values())
    assert rows["segments"][1].all()
    empty = read_rows(tokens, packing, np.zeros(0, np.int64), is_packed=True)
    assert {values.shape for values in empty.values()} == {(0, T)}
    integers = dict.fromkeys(("tokens", "labels", "segments", "positions"), "int32")
    dtypes = {name: values.dtype.name for name, values in rows.items()}
    assert dtypes == {**integers, "weights": "float32"}
