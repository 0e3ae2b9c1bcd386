"""How documents fill rows of T tokens: one plan for the whole corpus, made before the first row is read."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
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


def plan_packed(offsets: np.ndarray, lengths: np.ndarray, sequence_length: int) -> Plan:
    """Packs documents into as few rows as best-fit decreasing finds, longest pieces first.

    A document longer than T is cut into pieces of T and a rest. The pieces are strangers to
    attention: each is its own segment, with positions from 0. No label is lost at the seam: the
    last token of a piece is still asked for the token that follows in the document, so that a
    document's tokens but the first are each predicted once per epoch.

    Args:
        offsets: int64 [documents], first token of each document.
        lengths: int64 [documents], tokens of each document, at least 1.
        sequence_length: T.

    Source: Ding et al. 2024, Fewer truncations improve language modeling, arXiv 2404.10830 (section
        3, best-fit).
    Cost: O(pieces log pieces + T^2), in whole groups of equal pieces and rows.
    """
    counts = -(-lengths // sequence_length)
    skipped = _ranks(counts) * sequence_length
    starts = np.repeat(offsets, counts) + skipped
    rests = np.repeat(lengths, counts) - skipped
    sizes = np.minimum(rests, sequence_length)
    longest_first = np.argsort(-sizes, kind="stable")
    rows = _best_fit(np.bincount(sizes, minlength=sequence_length + 1), sequence_length)
    order = longest_first[np.argsort(rows, kind="stable")]
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Plan(starts[order], sizes[order], (rests == sizes)[order], row_offsets, sequence_length)


def plan_concatenated(offsets: np.ndarray, lengths: np.ndarray, sequence_length: int) -> Plan:
    """Joins documents end to end and cuts every T tokens, whatever lies there. Args as in plan_packed."""
    ends = np.cumsum(lengths)
    cuts = np.arange(0, ends[-1], sequence_length)
    edges = np.union1d(np.concatenate([[0], ends]), cuts)
    begins, sizes = edges[:-1], np.diff(edges)
    document = np.searchsorted(ends, begins, side="right")
    starts = begins - (ends - lengths)[document] + offsets[document]
    row_offsets = np.append(np.searchsorted(begins, cuts), len(begins))
    return Plan(starts, sizes, edges[1:] == ends[document], row_offsets, sequence_length)


def read_rows(
    tokens: np.ndarray, plan: Plan, rows: np.ndarray, *, is_packed: bool
) -> dict[str, np.ndarray]:
    """The rows of a batch.

    Args:
        tokens: the token array that the plan was made for.
        plan: which pieces a row holds.
        rows: int64 [b], rows of the plan; a row of -1 is padding.
        is_packed: each piece is a segment of its own; otherwise a row is one segment and attention
            crosses documents. The labels are the same: none crosses a document.

    Returns:
        tokens, labels, segments, positions int32 [b, T] and weights float32 [b, T]; all 0 where
        there is padding.
    """
    counts = np.where(rows < 0, 0, plan.row_offsets[rows + 1] - plan.row_offsets[rows])
    row, rank = np.repeat(np.arange(len(rows)), counts), _ranks(counts)
    piece = plan.row_offsets[rows][row] + rank
    lengths = plan.lengths[piece]
    within = _ranks(lengths)
    used = np.bincount(row, lengths, minlength=len(rows)).astype(np.int64)
    # Pieces fill a row from the left, so the tokens of all rows in order fill the mask of used
    # places in order.
    places = np.arange(plan.sequence_length) < used[:, None]
    source = np.repeat(plan.starts[piece], lengths) + within
    has_label = ~(
        np.repeat(plan.is_last[piece], lengths) & (within == np.repeat(lengths - 1, lengths))
    )
    following = tokens[np.where(has_label, source + 1, source)] * has_label
    segments = np.repeat(rank + 1, lengths) if is_packed else np.ones_like(source)
    positions = within if is_packed else _ranks(used)
    return {
        "tokens": _placed(tokens[source], places, np.int32),
        "labels": _placed(following, places, np.int32),
        "weights": _placed(has_label, places, np.float32),
        "segments": _placed(segments, places, np.int32),
        "positions": _placed(positions, places, np.int32),
    }


def _placed(values: np.ndarray, places: np.ndarray, dtype: type) -> np.ndarray:
    """`values` where `places` is true, in order, and 0 elsewhere."""
    filled = np.zeros(places.shape, dtype)
    filled[places] = values
    return filled


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ...: int64 [sum of counts]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _best_fit(counts: np.ndarray, capacity: int) -> np.ndarray:
    """Rows for pieces, longest first; `counts[s]` pieces have size s.

    Returns:
        int64 [pieces], the row of each, pieces sorted by size from `capacity` down to 1.
    """
    rows_with: list[list[np.ndarray]] = [
        [] for _ in range(capacity + 1)
    ]  # by the space that is left
    open_spaces = 0  # bit s: rows_with[s] is not empty
    num_rows, assigned = 0, []
    for size in range(capacity, 0, -1):
        wanted = int(counts[size])
        while wanted:
            fitting = open_spaces >> size
            if not fitting:
                # As many as the pieces of this size fill: in the rounds that follow they fit best.
                fresh = -(-wanted // (capacity // size))
                rows_with[capacity].append(np.arange(num_rows, num_rows + fresh))
                num_rows += fresh
                fitting = 1 << (capacity - size)
            space = size + (fitting & -fitting).bit_length() - 1
            group = rows_with[space].pop()
            taken, left = group[:wanted], group[wanted:]
            if len(left):
                rows_with[space].append(left)
            assigned.append(taken)
            rows_with[space - size].append(taken)
            wanted -= len(taken)
            open_spaces |= 1 << (space - size)
            open_spaces = (
                open_spaces | 1 << space if rows_with[space] else open_spaces & ~(1 << space)
            )
    return np.concatenate(assigned)
