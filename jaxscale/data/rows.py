"""The rows that corpora fill, and how a batch is put together from rows of several corpora."""

import numpy as np

from jaxscale.data.corpus import Corpus
from jaxscale.data.packing import concatenate_rows, pack_rows, read_rows
from jaxscale.types import Batch


class CorpusRows:
    """The rows that the documents of one corpus fill.

    Args:
        corpus: the documents.
        sequence_length: T, tokens in a row.
        is_packed: as in DataConfig.

    Attributes:
        num_rows: how many rows hold the corpus once.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, *, is_packed: bool):
        pack = pack_rows if is_packed else concatenate_rows
        self._tokens = corpus.cache.tokens
        self._trained = corpus.cache.trained
        self._packing = pack(corpus.offsets, corpus.lengths, sequence_length)
        self._is_packed, self._is_paired = is_packed, corpus.is_paired
        self.num_rows = self._packing.num_rows

    def read(self, rows: np.ndarray) -> Batch:
        """The rows with these numbers, numpy [len(rows), T]; a number of -1 gives padding."""
        batch = read_rows(
            self._tokens,
            self._packing,
            rows,
            is_packed=self._is_packed,
            trained=self._trained,
            is_paired=self._is_paired,
        )
        if not self._is_packed:
            # A row is one document to attention. Without segments it takes a plain causal backend,
            # which is faster.
            del batch["segments"]
            # Padding keeps its place in the row too: at position 0 it would be visible to all
            # tokens before it.
            shape = batch["tokens"].shape
            places = np.arange(shape[1], dtype=np.int32)
            batch["positions"] = np.broadcast_to(places, shape)
        return batch


def read_batch(corpora: list[CorpusRows], sources: np.ndarray, rows: np.ndarray) -> Batch:
    """Rows of several corpora in one batch.

    Args:
        corpora: the rows of each source.
        sources: int64 [b], the source of each row of the batch.
        rows: int64 [b], its number among the rows of that source.

    Returns:
        numpy [b, T] by name.
    """
    parts = []
    for source, corpus in enumerate(corpora):
        parts.append(corpus.read(rows[sources == source]))
    # The parts hold the rows source by source; `places` puts each where the batch has it.
    by_source = np.argsort(sources, kind="stable")
    places = np.argsort(by_source)
    batch = {}
    for name in parts[0]:
        joined = np.concatenate([part[name] for part in parts])
        batch[name] = joined[places]
    return batch
