"""From a data configuration to batches.

The global batch of step n is a function of the configuration and n alone.
"""

import dataclasses
import logging
import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jaxscale.data.cache import open_cache
from jaxscale.data.corpus import Corpus, pairs_that_fit, select_split
from jaxscale.data.mixture import Mixture
from jaxscale.data.permutation import permute
from jaxscale.data.preferences import PreferenceSource
from jaxscale.data.prompts import PromptSource
from jaxscale.data.rows import CorpusRows, read_batch
from jaxscale.data.sources import Source
from jaxscale.data.split import HeldOutBy, Split, check_held_out_fraction
from jaxscale.data.tokenizer import TokenizerConfig, load_tokenizer
from jaxscale.types import Batch, InputError, check_choice, check_positive, check_types

logger = logging.getLogger(__name__)

# Raised when packing, permutation or mixture give other batches from the same configuration.
FORMAT = 1
# What was so before a state said it.
EARLIER = {"format": 1, "held_out_by": "key"}
NUM_PREFETCHED = 4


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads.

    Args:
        sources: where the text comes from.
        weights: share of each source in the rows of the training split; None: equal shares.
        tokenizer: how text becomes tokens.
        held_out_fraction: about this share of the documents is never trained on.
        held_out_by: `text`: a hash of a document's text chooses those, so that all copies of a text
            are on one side, whatever file or source they come from. `key`: a hash of its key, by
            which earlier versions chose; copies under other keys may be on both sides.
        sequence_length: T, tokens in a row.
        batch_size: rows in a global batch.
        seed: shuffles the rows of each source anew in each epoch, and phases the mixture.
        cache_directory: where tokenised sources are kept; runs share it.
        is_cache_verified: all that is kept there is compared with its hashes before it is used;
            otherwise, of the tokens, a sample of 64 MiB.
        is_packed: documents are packed into rows and attention stays within a document; otherwise
            they are joined end to end, rows are cut every T tokens, attention crosses documents and
            batches have no `segments`.
    """

    sources: tuple[Source, ...]
    sequence_length: int
    batch_size: int
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    weights: tuple[float, ...] | None = None
    held_out_fraction: float = 0.05
    held_out_by: HeldOutBy = "text"
    seed: int = 0
    cache_directory: str = "~/.cache/jaxscale"
    is_cache_verified: bool = False
    is_packed: bool = True

    def __post_init__(self):
        check_types(self)
        check_positive("DataConfig.sequence_length", self.sequence_length)
        check_positive("DataConfig.batch_size", self.batch_size)
        check_held_out_fraction("DataConfig.held_out_fraction", self.held_out_fraction)
        if (num_sources := len(self.sources)) == 0:
            raise InputError("DataConfig.sources", self.sources, "at least one source")
        if self.weights is not None and len(self.weights) != num_sources:
            expected = f"one a source: {len(self.weights)} == {num_sources} does not hold"
            raise InputError("DataConfig.weights", self.weights, expected)
        for kind in (PreferenceSource, PromptSource):
            if self._has(kind) and not all(isinstance(source, kind) for source in self.sources):
                expected = f"{kind.__name__} alone, or none"
                raise InputError("DataConfig.sources", self.sources, expected)
        if self.is_paired and not self.is_packed:
            raise InputError("DataConfig.is_packed", False, "True for pairs of PreferenceSource")

    @property
    def is_paired(self) -> bool:
        """Whether the documents are pairs of answers."""
        return self._has(PreferenceSource)

    @property
    def is_prompted(self) -> bool:
        """Whether the documents are prompts, which a model answers."""
        return self._has(PromptSource)

    def _has(self, kind: type) -> bool:
        return any(isinstance(source, kind) for source in self.sources)


def make_loader(
    config: DataConfig, *, split: Split = "train", process_index: int = 0, process_count: int = 1
) -> "TrainLoader | HeldOutLoader":
    """Batches of one split for one host.

    Args:
        config: what to read.
        split: `train`: without end; `held_out`: each document once in every pass.
        process_index: this host; it gets rows [process_index * b, (process_index + 1) * b) of each
            global batch.
        process_count: number of hosts; b = batch_size / process_count.

    Raises:
        InputError: a source is missing or empty, the split has no documents, or the batch does not
            divide.
    """
    check_choice("split", split, ("train", "held_out"))
    if config.is_prompted:
        raise InputError("DataConfig.sources", config.sources, "texts: only rollouts take prompts")
    num_local, rest = divmod(config.batch_size, process_count)
    if rest:
        equation = f"{config.batch_size} % {process_count} = {rest}, not 0"
        expected = f"a multiple of the number of hosts: {equation}"
        raise InputError("DataConfig.batch_size", config.batch_size, expected)
    local_rows = np.arange(process_index * num_local, (process_index + 1) * num_local)
    corpora = open_corpora(config, split)
    if split == "train":
        return TrainLoader(config, corpora, local_rows)
    return HeldOutLoader(config, corpora, local_rows)


def open_corpora(config: DataConfig, split: Split) -> list[Corpus]:
    """The documents of each source that are in `split`; builds the token caches that are missing.

    Raises:
        InputError: as in make_loader.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    fraction, by = config.held_out_fraction, config.held_out_by
    corpora = []
    for source in config.sources:
        directory, is_verified = config.cache_directory, config.is_cache_verified
        cache = open_cache(source, tokenizer, directory, is_verified=is_verified)
        corpus = select_split(cache, split, fraction, by)
        corpora.append(
            pairs_that_fit(corpus, config.sequence_length) if config.is_paired else corpus
        )
    sizes = [len(corpus.documents) for corpus in corpora]
    # Every source must have documents to train on; held-out documents of some sources are enough.
    is_enough = all(sizes) if split == "train" else any(sizes)
    if not is_enough:
        expected = (
            f"a fraction that leaves documents in the split {split!r}: "
            f"of each source it has {sizes}"
        )
        raise InputError("DataConfig.held_out_fraction", fraction, expected)
    return corpora


def warn_of_trained_documents(state: dict[str, Any], config: DataConfig) -> None:
    """Logs a warning if a training did not hold out all documents that `config` holds out.

    Args:
        state: the state of the training's loader; one that names no fraction gives no warning.
        config: what is to be evaluated.
    """
    facts = state.get("depends_on", {})
    trained = facts.get("held_out_fraction", 1.0)
    if config.held_out_fraction > trained:
        logger.warning(
            "DataConfig.held_out_fraction: %s is above the %s of the training, which may have "
            "seen some of these",
            config.held_out_fraction,
            trained,
        )
    trained_by = facts.get("held_out_by", EARLIER["held_out_by"])
    if 0 < trained < 1 and config.held_out_by != trained_by:
        logger.warning(
            "DataConfig.held_out_by: %r is not the %r of the training, which may have seen some of "
            "these",
            config.held_out_by,
            trained_by,
        )


class TrainLoader:
    """The training split without end: sources interleaved by weight, shuffled in every epoch.

    Args:
        config: what to read.
        corpora: the training documents of each source.
        local_rows: int64 [b], which rows of a global batch this host reads.

    Attributes:
        rows_per_epoch: how many rows hold each source once.
        num_documents: that are trained on.
        num_held_out: documents that are not.
        num_tokens: of the documents that are trained on, with the one that ends each.
    """

    def __init__(self, config: DataConfig, corpora: list[Corpus], local_rows: np.ndarray):
        self._config = config
        self._local_rows = local_rows
        self._corpora = _corpora_rows(config, corpora)
        self.rows_per_epoch = [corpus.num_rows for corpus in self._corpora]
        self.num_documents = sum(len(corpus.documents) for corpus in corpora)
        self.num_held_out = sum(corpus.num_others for corpus in corpora)
        self.num_tokens = sum(int(corpus.lengths.sum()) for corpus in corpora)
        self._mixture = Mixture(_weights(config), config.seed)
        self._facts = _facts(config, corpora)
        self._batches = iter(_prefetched(self, sys.maxsize))
        self._next = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._next += 1
        return batch

    def batch_at(self, n: int) -> Batch:
        """This host's rows of global batch `n`, numpy [b, T]."""
        sources = self.sources_at(n)
        positions = self._mixture.positions(self._rows_at(n))
        rows = np.zeros_like(positions)
        for source in range(len(self._corpora)):
            chosen = sources == source
            rows[chosen] = self._shuffled(source, positions[chosen])
        return read_batch(self._corpora, sources, rows)

    def sources_at(self, n: int) -> np.ndarray:
        """The source of each of this host's rows of global batch `n`: int64 [b]."""
        return self._mixture.sources(self._rows_at(n))

    def _rows_at(self, n: int) -> np.ndarray:
        return n * self._config.batch_size + self._local_rows

    def _shuffled(self, source: int, positions: np.ndarray) -> np.ndarray:
        """The rows of one source at `positions` of its endless sequence of shuffled epochs."""
        size = self.rows_per_epoch[source]
        epochs, within = np.divmod(positions, size)
        rows = np.zeros_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = permute(
                within[chosen],
                size,
                seed=self._config.seed,
                stream=source,
                epoch=int(epoch),
            )
        return rows

    def state(self) -> dict[str, Any]:
        """The loader's position and what it depends on, JSON-able.

        Returns:
            `batch`: the next batch; `positions`: how many rows each source has served before it;
            `depends_on`: the facts that decide what the batches hold.
        """
        return {
            "batch": self._next,
            "positions": self.served_before(self._next),
            "depends_on": self._facts,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at `state`, whatever the number of hosts that wrote it.

        With another batch size it goes on with the row after the last one that was served.

        Raises:
            InputError: the state is of other data or of another configuration, or the rows served
                are no whole number of batches of the new size; names the field.
        """
        defaults = EARLIER | {"tokenizer": self._facts["tokenizer"]}
        if not self._config.held_out_fraction:
            defaults["held_out_by"] = self._config.held_out_by  # nothing was, either way
        saved = defaults | state.get("depends_on", {})
        for name, value in self._facts.items():
            is_number_of_rows = name == "batch_size" and name in saved
            if saved.get(name) != value and not is_number_of_rows:
                expected = f"{saved.get(name)!r}, with which the run was begun"
                raise InputError(f"DataConfig.{name}", value, expected)
        batch = self._batch_after(state["batch"] * saved["batch_size"])
        positions = state["positions"]
        served = self.served_before(batch)
        if positions != served:
            expected = f"{served} before batch {batch}"
            raise InputError("data state positions", positions, expected)
        self._next = batch
        self._batches.set_state({"next_index": batch})

    def _batch_after(self, num_rows: int) -> int:
        """The batch that begins with the row after the first `num_rows`."""
        size = self._config.batch_size
        batch, rest = divmod(num_rows, size)
        if rest:
            expected = f"rows served % batch_size == 0, here {num_rows} % {size} = {rest}"
            raise InputError("DataConfig.batch_size", size, expected)
        return batch

    def served_before(self, batch: int) -> list[int]:
        """How many rows each source serves before global batch `batch`."""
        return self._mixture.served(batch * self._config.batch_size)


class HeldOutLoader:
    """The held-out documents of all sources, each once in every pass.

    The last batch is filled up with padding.

    Args: as in TrainLoader.

    Attributes:
        num_scored_bytes: UTF-8 bytes of the documents' text without the first token of each, which
            is not predicted, over all hosts.
        num_tokens: tokens that are predicted in a pass (the sum of all weights), over all hosts.
    """

    def __init__(self, config: DataConfig, corpora: list[Corpus], local_rows: np.ndarray):
        corpora = [corpus for corpus in corpora if len(corpus.documents)]
        self._config = config
        self._local_rows = local_rows
        self._corpora = _corpora_rows(config, corpora)
        num_rows = [corpus.num_rows for corpus in self._corpora]
        self._first_rows = np.cumsum([0] + num_rows)  # the last is their total
        self.num_scored_bytes = sum(corpus.num_scored_bytes for corpus in corpora)
        self.num_tokens = sum(corpus.num_tokens for corpus in corpora)

    def __len__(self) -> int:
        """Batches in a pass."""
        total = int(self._first_rows[-1])
        return -(-total // self._config.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return iter(_prefetched(self, len(self)))

    def batch_at(self, n: int) -> Batch:
        """This host's rows of global batch `n`, numpy [b, T]."""
        stream = n * self._config.batch_size + self._local_rows
        sources = np.searchsorted(self._first_rows, stream, side="right") - 1
        # Rows beyond the last document are padding, which any source can give.
        sources = np.clip(sources, 0, len(self._corpora) - 1)
        is_padding = stream >= self._first_rows[-1]
        rows = np.where(is_padding, -1, stream - self._first_rows[sources])
        return read_batch(self._corpora, sources, rows)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A loader's batches as grain's random-access source."""

    loader: TrainLoader | HeldOutLoader
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, n: int) -> Batch:
        return self.loader.batch_at(n)


def _prefetched(loader: TrainLoader | HeldOutLoader, num_batches: int) -> grain.IterDataset:
    """The loader's batches in order, a few of them read ahead by one thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=NUM_PREFETCHED)
    batches = grain.MapDataset.source(_Batches(loader, num_batches))
    return batches.to_iter_dataset(options)


def _corpora_rows(config: DataConfig, corpora: list[Corpus]) -> list[CorpusRows]:
    rows = []
    for corpus in corpora:
        rows.append(CorpusRows(corpus, config.sequence_length, is_packed=config.is_packed))
    return rows


def _weights(config: DataConfig) -> tuple[float, ...]:
    return config.weights or (1.0,) * len(config.sources)


def _facts(config: DataConfig, corpora: list[Corpus]) -> dict[str, Any]:
    """Everything that decides what the global batches hold, by field of DataConfig."""
    return {
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "held_out_fraction": config.held_out_fraction,
        "held_out_by": config.held_out_by,
        "seed": config.seed,
        "is_packed": config.is_packed,
        "format": FORMAT,
        "weights": list(_weights(config)),
        "tokenizer": corpora[0].cache.tokenizer,
        # Not the cache's fingerprint: the machine that resumes may have the same text in another
        # folder, with other modification times.
        "sources": [corpus.cache.content for corpus in corpora],
    }
