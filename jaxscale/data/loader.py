"""From a data configuration to batches: the global batch of step n is a function of the configuration and n alone."""

import dataclasses
import logging
import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jaxscale.data.cache import open_cache
from jaxscale.data.corpus import Corpus, select_split
from jaxscale.data.mixture import Mixture
from jaxscale.data.packing import plan_concatenated, plan_packed, read_rows
from jaxscale.data.permutation import permute
from jaxscale.data.sources import Source
from jaxscale.data.split import Split, check_held_out_fraction
from jaxscale.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from jaxscale.types import Batch, InputError, check_choice, check_positive, check_types

logger = logging.getLogger(__name__)

# Raised when packing, permutation or mixture give other batches from the same configuration.
FORMAT = 1
NUM_PREFETCHED = 4


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads.

    Args:
        sources: where the text comes from.
        weights: share of each source in the rows of the training split; None: equal shares.
        tokenizer: how text becomes tokens.
        held_out_fraction: about this share of the documents, chosen by a hash of their keys, is
            never trained on.
        sequence_length: T, tokens in a row.
        batch_size: rows in a global batch.
        seed: shuffles the rows of each source anew in each epoch, and phases the mixture.
        cache_directory: where tokenised sources are kept; runs share it.
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
    seed: int = 0
    cache_directory: str = "~/.cache/jaxscale"
    is_packed: bool = True

    def __post_init__(self):
        check_types(self)
        for name in ("sequence_length", "batch_size"):
            check_positive(f"DataConfig.{name}", getattr(self, name))
        check_held_out_fraction("DataConfig.held_out_fraction", self.held_out_fraction)
        if not self.sources:
            raise InputError("DataConfig.sources", self.sources, "at least one source")
        if self.weights is not None and len(self.weights) != len(self.sources):
            expected = (
                f"one weight per source: {len(self.weights)} == {len(self.sources)} does not hold"
            )
            raise InputError("DataConfig.weights", self.weights, expected)


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
    rest = config.batch_size % process_count
    if rest:
        expected = f"a multiple of the number of hosts: {config.batch_size} % {process_count} = {rest}, not 0"
        raise InputError("DataConfig.batch_size", config.batch_size, expected)
    num_local = config.batch_size // process_count
    local_rows = np.arange(process_index * num_local, (process_index + 1) * num_local)
    loader = TrainLoader if split == "train" else HeldOutLoader
    return loader(config, open_corpora(config, split), local_rows)


def open_corpora(config: DataConfig, split: Split) -> list[Corpus]:
    """The documents of each source that are in `split`; builds the token caches that are missing.

    Raises:
        InputError: as in make_loader.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    caches = [open_cache(source, tokenizer, config.cache_directory) for source in config.sources]
    corpora = [select_split(cache, split, config.held_out_fraction) for cache in caches]
    sizes = [len(corpus.documents) for corpus in corpora]
    # Every source must train; held-out documents of some sources are enough.
    if not (all if split == "train" else any)(sizes):
        expected = f"a fraction that leaves documents in the split {split!r}: of each source it has {sizes}"
        raise InputError("DataConfig.held_out_fraction", config.held_out_fraction, expected)
    return corpora


def check_tokenizer(state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raises InputError if the training whose loader had `state` read its text with another tokenizer."""
    trained = state.get("depends_on", {}).get("tokenizer", tokenizer.fingerprint)
    if trained != tokenizer.fingerprint:
        expected = f"the tokenizer that the model was trained with, of fingerprint {trained}"
        raise InputError("TokenizerConfig", tokenizer.fingerprint, expected)


def warn_of_trained_documents(state: dict[str, Any], held_out_fraction: float) -> None:
    """Logs a warning if the training whose loader had `state` held out fewer documents than `held_out_fraction`."""
    trained = state.get("depends_on", {}).get("held_out_fraction", 1.0)
    if held_out_fraction > trained:
        logger.warning(
            "DataConfig.held_out_fraction: %s is above the %s of the training, which may have seen some of these",
            held_out_fraction,
            trained,
        )


class TrainLoader:
    """The training split without end: sources interleaved by weight, each shuffled anew in every epoch.

    Args:
        config: what to read.
        corpora: the training documents of each source.
        local_rows: int64 [b], which rows of a global batch this host reads.

    Attributes:
        rows_per_epoch: how many rows hold each source once.
    """

    def __init__(self, config: DataConfig, corpora: list[Corpus], local_rows: np.ndarray):
        self._config = config
        self._local_rows = local_rows
        self._rows = [_Rows(corpus, config) for corpus in corpora]
        self.rows_per_epoch = [rows.num_rows for rows in self._rows]
        self._mixture = Mixture(config.weights or (1.0,) * len(corpora), config.seed)
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
        rows = n * self._config.batch_size + self._local_rows
        sources, positions = self._mixture.sources(rows), self._mixture.positions(rows)
        parts = [
            each.read(self._shuffled(source, positions[sources == source]))
            for source, each in enumerate(self._rows)
        ]
        order = np.argsort(np.argsort(sources, kind="stable"))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}

    def _shuffled(self, source: int, positions: np.ndarray) -> np.ndarray:
        """The rows of the source's plan that stand at `positions` of its stream of epochs."""
        size = self.rows_per_epoch[source]
        epochs, within = positions // size, positions % size
        rows = np.zeros_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = permute(
                within[chosen], size, seed=self._config.seed, stream=source, epoch=int(epoch)
            )
        return rows

    def state(self) -> dict[str, Any]:
        """JSON-able: the next batch, how many rows each source has served before it, and what they depend on."""
        served = self._mixture.served(self._next * self._config.batch_size)
        return {"batch": self._next, "positions": served, "depends_on": self._facts}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at `state`, whatever the number of hosts that wrote it.

        Raises:
            InputError: the state is of other data or of another configuration; names the field.
        """
        # The first states had neither.
        saved = {"format": 1, "tokenizer": self._facts["tokenizer"]} | state.get("depends_on", {})
        for name, value in self._facts.items():
            if saved.get(name) != value:
                raise InputError(
                    f"DataConfig.{name}",
                    value,
                    f"{saved.get(name)!r}, with which the run was begun",
                )
        served = self._mixture.served(state["batch"] * self._config.batch_size)
        if state["positions"] != served:
            raise InputError(
                "data state positions",
                state["positions"],
                f"{served} before batch {state['batch']}",
            )
        self._next = state["batch"]
        self._batches.set_state({"next_index": self._next})


class HeldOutLoader:
    """The held-out documents of all sources, each once in every pass; the last batch is filled up with padding.

    Args: as in TrainLoader.

    Attributes:
        num_bytes: UTF-8 bytes of the documents' text, over all hosts.
        num_tokens: tokens that are predicted in a pass (the sum of all weights), over all hosts.
    """

    def __init__(self, config: DataConfig, corpora: list[Corpus], local_rows: np.ndarray):
        corpora = [corpus for corpus in corpora if len(corpus.documents)]
        self._config = config
        self._local_rows = local_rows
        self._rows = [_Rows(corpus, config) for corpus in corpora]
        self._firsts = np.cumsum([0] + [rows.num_rows for rows in self._rows])
        self.num_bytes = sum(corpus.num_bytes for corpus in corpora)
        self.num_tokens = sum(corpus.num_tokens for corpus in corpora)

    def __len__(self) -> int:
        """Batches in a pass."""
        return -(-int(self._firsts[-1]) // self._config.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return iter(_prefetched(self, len(self)))

    def batch_at(self, n: int) -> Batch:
        """This host's rows of global batch `n`, numpy [b, T]."""
        rows = n * self._config.batch_size + self._local_rows
        sources = np.clip(
            np.searchsorted(self._firsts, rows, side="right") - 1, 0, len(self._rows) - 1
        )
        within = np.where(rows < self._firsts[-1], rows - self._firsts[sources], -1)
        parts = [each.read(within[sources == source]) for source, each in enumerate(self._rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Rows:
    """The rows into which the documents of one corpus are laid."""

    def __init__(self, corpus: Corpus, config: DataConfig):
        plan = plan_packed if config.is_packed else plan_concatenated
        self._tokens = corpus.cache.tokens
        self._plan = plan(corpus.offsets, corpus.lengths, config.sequence_length)
        self._is_packed = config.is_packed
        self.num_rows = self._plan.num_rows

    def read(self, rows: np.ndarray) -> Batch:
        batch = read_rows(self._tokens, self._plan, rows, is_packed=self._is_packed)
        if not self._is_packed:
            del batch[
                "segments"
            ]  # a row is one document to attention, whose plain causal backends are the fast ones
            # Padding too has its place in the row: at position 0 it would be visible to all that
            # stands before it.
            batch["positions"] = np.broadcast_to(
                np.arange(batch["tokens"].shape[1], dtype=np.int32), batch["tokens"].shape
            )
        return batch


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
    return grain.MapDataset.source(_Batches(loader, num_batches)).to_iter_dataset(options)


def _facts(config: DataConfig, corpora: list[Corpus]) -> dict[str, Any]:
    """Everything that decides what the global batches hold, by field of DataConfig."""
    fields = ("sequence_length", "batch_size", "held_out_fraction", "seed", "is_packed")
    weights = config.weights or (1.0,) * len(corpora)
    # Not the cache's fingerprint: the same text may lie elsewhere, with other times, on the machine
    # that resumes.
    sources = [corpus.cache.content for corpus in corpora]
    facts = {
        "format": FORMAT,
        "weights": list(weights),
        "tokenizer": corpora[0].cache.tokenizer,
        "sources": sources,
    }
    return {name: getattr(config, name) for name in fields} | facts
