"""How documents fill rows of T tokens.

One packing for the whole corpus is made before the first row is read.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which pieces of documents each row holds, in order. A piece never crosses a document's end.

    Args:
        starts: int64 [pieces], the first token of each piece in the token array.
        lengths: int64 [pieces].
        is_last: bool [pieces], whether the piece ends its document.
        row_offsets: int64 [rows + 1]; row r holds pieces row_offsets[r]:row_offsets[r + 1].
        sequence_length: T; the lengths of a row's pieces add up to at most T.
    """

    starts: np.ndarray
    lengths: np.ndarray
    is_last: np.ndarray
    row_offsets: np.ndarray
    sequence_length: int

    @property
    def num_rows(self) -> int:
        """Rows that the documents fill."""
        return len(self.row_offsets) - 1


def pack_rows(offsets: np.ndarray, lengths: np.ndarray, sequence_length: int) -> Packing:
    """Packs documents into as few rows as best-fit decreasing finds, longest pieces first.

    A document longer than T is cut into pieces of T and a rest. Attention does not cross from one
    piece to the next: each is its own segment, with positions from 0. No label is lost at the cut:
    the last token of a piece still predicts the token that follows in the document. So all tokens
    of a document but its first are predicted once per epoch.

    Args:
        offsets: int64 [documents], first token of each document.
        lengths: int64 [documents], tokens of each document, at least 1.
        sequence_length: T.

    Source: Ding et al. 2024, Fewer truncations improve language modeling, arXiv 2404.10830 (section
        3, best-fit).
    Cost: O(pieces log pieces + T^2), in whole groups of equal pieces and rows.
    """
    num_pieces = -(-lengths // sequence_length)
    skipped = _ranks(num_pieces) * sequence_length
    starts = np.repeat(offsets, num_pieces) + skipped
    remaining = np.repeat(lengths, num_pieces) - skipped
    sizes = np.minimum(remaining, sequence_length)
    is_last = remaining == sizes

    longest_first = np.argsort(-sizes, kind="stable")
    num_of_size = np.bincount(sizes, minlength=sequence_length + 1)
    rows = _best_fit(num_of_size, sequence_length)
    order = longest_first[np.argsort(rows, kind="stable")]
    num_in_row = np.bincount(rows)
    row_offsets = np.concatenate([[0], np.cumsum(num_in_row)])
    return Packing(starts[order], sizes[order], is_last[order], row_offsets, sequence_length)


def concatenate_rows(offsets: np.ndarray, lengths: np.ndarray, sequence_length: int) -> Packing:
    """Joins documents end to end and cuts every T tokens, whatever stands there.

    Args as in pack_rows.
    """
    document_ends = np.cumsum(lengths)
    row_starts = np.arange(0, document_ends[-1], sequence_length)
    # A piece ends where its document or its row does. Edges are places in the joined text.
    edges = np.union1d(np.concatenate([[0], document_ends]), row_starts)
    begins = edges[:-1]
    ends = edges[1:]
    document = np.searchsorted(document_ends, begins, side="right")
    document_begins = (document_ends - lengths)[document]
    starts = begins - document_begins + offsets[document]
    is_last = ends == document_ends[document]
    row_offsets = np.append(np.searchsorted(begins, row_starts), len(begins))
    return Packing(starts, ends - begins, is_last, row_offsets, sequence_length)


def read_rows(
    tokens: np.ndarray,
    packing: Packing,
    rows: np.ndarray,
    *,
    is_packed: bool,
    trained: np.ndarray | None = None,
    is_paired: bool = False,
) -> dict[str, np.ndarray]:
    """The rows of a batch.

    Args:
        tokens: the token array that the packing was made for.
        packing: which pieces a row holds.
        rows: int64 [b], rows of the packing; a row of -1 is padding.
        is_packed: each piece is a segment of its own; otherwise a row is one segment and attention
            crosses documents. The labels are the same: none crosses a document.
        trained: bool, of each token whether it is learned to be predicted; None for all.
        is_paired: each piece is a pair of answers, the halves of which are segments of their own:
            2 p + 1 and 2 p + 2 for pair p of a row. The first ends with its trained tokens.

    Returns:
        tokens, labels, segments, positions int32 [b, T] and weights float32 [b, T]; all 0 where
        there is padding.
    """
    # Of each piece, in the order of the batch: its row of the batch, its rank in that row, its
    # place in the packing and its length.
    num_planned = packing.row_offsets[rows + 1] - packing.row_offsets[rows]
    num_pieces = np.where(rows < 0, 0, num_planned)
    row = np.repeat(np.arange(len(rows)), num_pieces)
    rank = _ranks(num_pieces)
    piece = packing.row_offsets[rows][row] + rank
    lengths = packing.lengths[piece]

    # Of each token, in the same order: its place in the piece, its index in `tokens` and its
    # label.
    place_in_piece = _ranks(lengths)
    index = np.repeat(packing.starts[piece], lengths) + place_in_piece
    ends_piece = place_in_piece == np.repeat(lengths - 1, lengths)
    ends_document = ends_piece & np.repeat(packing.is_last[piece], lengths)
    has_label = ~ends_document
    following = np.where(has_label, index + 1, index)
    labels = tokens[following] * has_label
    has_weight = has_label if trained is None else has_label & trained[following]

    num_used = np.bincount(row, lengths, minlength=len(rows)).astype(np.int64)
    if is_paired:
        half, positions = _halves(trained[index], place_in_piece, lengths)
        segments = 2 * np.repeat(rank, lengths) + half + 1
    elif is_packed:
        segments = np.repeat(rank + 1, lengths)
        positions = place_in_piece
    else:
        segments = np.ones_like(index)
        positions = _ranks(num_used)

    # Pieces fill a row from the left. So the tokens of all rows, in order, are those for which
    # this mask is true, in order.
    is_used = np.arange(packing.sequence_length) < num_used[:, None]
    return {
        "tokens": _scattered(tokens[index], is_used, np.int32),
        "labels": _scattered(labels, is_used, np.int32),
        "weights": _scattered(has_weight, is_used, np.float32),
        "segments": _scattered(segments, is_used, np.int32),
        "positions": _scattered(positions, is_used, np.int32),
    }


def _halves(
    is_trained: np.ndarray,
    place_in_piece: np.ndarray,
    lengths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each token of pairs, the half that it is in, 0 or 1, and its place in that half."""
    piece = np.repeat(np.arange(len(lengths)), lengths)
    # An answer ends with a trained token before one that is not: the other answer's prompt, or what
    # ends the pair.
    ends_answer = np.append(is_trained[:-1] & ~is_trained[1:], False)
    first = np.full(len(lengths), -1)
    ends, places = piece[ends_answer], place_in_piece[ends_answer]
    first[ends[::-1]] = places[::-1]  # of a piece's ends the first is written last
    second = np.repeat(first + 1, lengths)
    half = (place_in_piece >= second).astype(np.int64)
    return half, place_in_piece - half * second


def _scattered(values: np.ndarray, mask: np.ndarray, dtype: type) -> np.ndarray:
    """`values` where `mask` is true, in order, and 0 elsewhere."""
    filled = np.zeros(mask.shape, dtype)
    filled[mask] = values
    return filled


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ...: int64 [sum of counts]."""
    ends = np.cumsum(counts)
    total = ends[-1] if len(ends) else 0
    firsts = np.repeat(ends - counts, counts)
    return np.arange(total) - firsts


def _best_fit(counts: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, longest first, each in the fullest row that has space for it.

    Pieces of one size are placed in groups, because a corpus has far more pieces than sizes.

    Args:
        counts: int64 [capacity + 1]; counts[s] pieces have size s.
        capacity: size of a row.

    Returns:
        int64 [pieces], the row of each, pieces sorted by size from `capacity` down to 1.
    """
    open_rows = _OpenRows(capacity)
    num_rows = 0
    assigned = []
    for size in range(capacity, 0, -1):
        num_left = int(counts[size])
        while num_left:
            if not open_rows.can_hold(size):
                # Open all the rows that the pieces left of this size fill: once the first piece
                # is in such a row, it is the fullest that has space for the next one.
                num_new = -(-num_left // (capacity // size))
                open_rows.add(np.arange(num_rows, num_rows + num_new), capacity)
                num_rows += num_new
            rows, space = open_rows.take_fullest(size)
            if len(rows) > num_left:
                open_rows.add(rows[num_left:], space)
                rows = rows[:num_left]
            open_rows.add(rows, space - size)
            assigned.append(rows)
            num_left -= len(rows)
    return np.concatenate(assigned)


class _OpenRows:
    """Groups of rows by the space that is left in them.

    The bits of one integer say which spaces some row has left, so that the fullest rows with
    enough space are found without a search.
    """

    def __init__(self, capacity: int):
        self._groups: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self._spaces = 0  # bit s: some row has space s left

    def add(self, rows: np.ndarray, space: int) -> None:
        self._groups[space].append(rows)
        self._spaces |= 1 << space

    def can_hold(self, size: int) -> bool:
        return self._spaces >> size > 0

    def take_fullest(self, size: int) -> tuple[np.ndarray, int]:
        """Removes and returns a group with the least space that fits `size`, and that space."""
        enough = self._spaces >> size
        lowest_bit = enough & -enough
        space = size + lowest_bit.bit_length() - 1
        rows = self._groups[space].pop()
        if not self._groups[space]:
            self._spaces &= ~(1 << space)
        return rows, space
