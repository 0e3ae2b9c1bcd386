"""`data`: what a run will be trained on, in counts and as the text of a batch."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxscale.data.corpus import Corpus, select_split
from jaxscale.data.loader import TrainLoader, make_loader, open_corpora
from jaxscale.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from jaxscale.run.run import Run
from jaxscale.types import Batch, InputError, check_not_negative

CUT = " ... "  # stands for the middle of a text


@dataclasses.dataclass(frozen=True)
class SourceFigures:
    """What a source gives to the training split.

    Args:
        name: of the source: its place and class.
        documents: that are trained on.
        held_out: documents that are not.
        copies: documents that are trained on and have the text of another one.
        longer: documents that are trained on and are longer than a row.
        bytes: UTF-8 bytes of the documents that are trained on.
        tokens: their tokens, with the one that ends each.
        predicted: their tokens without the first of each.
        rows: that hold them once.
        positions: of these rows.
        served: rows that the run takes of them.
    """

    name: str
    documents: int
    held_out: int
    copies: int
    longer: int
    bytes: int
    tokens: int
    predicted: int
    rows: int
    positions: int
    served: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens of a row that belong to one document and attend to one another.

    Args:
        tokens: int32 [n].
        is_end: whether the document ends with them.
    """

    tokens: np.ndarray
    is_end: bool


def show_data(
    *,
    run: Run,
    batch: int = 0,
    num_rows: int = 4,
    num_characters: int = 200,
) -> list[SourceFigures]:
    """Prints what a run will be trained on: counts, how full its rows are, and rows as text.

    The token caches that are missing are built. No device is needed.

    Args:
        run: the run.
        batch: which batch is shown.
        num_rows: how many of its rows are.
        num_characters: of each piece of a document, its beginning and end.
    Returns:
        The figures of each source.
    Raises:
        InputError: the data cannot be read, or has more tokens than the model.
    """
    if not 0 <= batch < run.train.steps:
        raise InputError("batch", batch, f"0 <= batch < steps = {run.train.steps}")
    check_not_negative("num_rows", num_rows)
    if num_characters <= len(CUT):
        raise InputError("num_characters", num_characters, f"more than {len(CUT)}")
    tokenizer = load_tokenizer(run.data.tokenizer)
    check_vocabulary(tokenizer, run.model.vocab_size)
    loader = make_loader(run.data)
    figures = _figures(run, loader, open_corpora(run.data, "train"))
    print(_table(figures))
    print(f"\n{_summary(run, tokenizer, figures)}")
    content, sources = loader.batch_at(batch), loader.sources_at(batch)
    for row in range(min(num_rows, run.data.batch_size)):
        source = figures[sources[row]].name
        print(f"\nbatch {batch}, row {row} of {run.data.batch_size}, source {source}")
        print("\n".join(_lines(pieces_of(content, row), tokenizer, num_characters)))
    return figures


def pieces_of(batch: Batch, row: int) -> list[Piece]:
    """A row cut where documents end, and where attention does.

    Args:
        batch: numpy [b, T] by name, as loaders give it.
        row: of the batch.
    """
    tokens, weights = batch["tokens"][row], batch["weights"][row]
    is_end = weights == 0
    if "segments" in batch:
        # Of a chat most tokens have weight 0, and so has the last one of every segment.
        segments = batch["segments"][row]
        num_used = np.count_nonzero(segments)
        is_cut = np.diff(segments[:num_used]) != 0
    else:
        # A document's last token has weight 0, and so has padding, which begins after it.
        num_used = min(np.flatnonzero(weights).max(initial=-1) + 2, len(tokens))
        is_cut = is_end[: num_used - 1]
    cuts = np.flatnonzero(is_cut) + 1
    borders = [0, *cuts, num_used] if num_used else []
    return [
        Piece(tokens[begin:end], bool(is_end[end - 1]))
        for begin, end in itertools.pairwise(borders)
    ]


def _figures(run: Run, loader: TrainLoader, corpora: Sequence[Corpus]) -> list[SourceFigures]:
    config, found = run.data, []
    served = loader.served_before(run.train.steps)
    for number, corpus in enumerate(corpora):
        held_out = select_split(
            corpus.cache, "held_out", config.held_out_fraction, config.held_out_by
        )
        texts = corpus.cache.text_hashes[corpus.documents]
        rows = loader.rows_per_epoch[number]
        found.append(
            SourceFigures(
                name=f"{number} {type(config.sources[number]).__name__}",
                documents=len(corpus.documents),
                held_out=len(held_out.documents),
                copies=len(texts) - len(np.unique(texts)),
                longer=int((corpus.lengths > config.sequence_length).sum()),
                bytes=corpus.num_bytes,
                tokens=int(corpus.lengths.sum()),
                predicted=corpus.num_tokens,
                rows=rows,
                positions=rows * config.sequence_length,
                served=served[number],
            )
        )
    return found


def _table(figures: Sequence[SourceFigures]) -> str:
    total = sum(each.served for each in figures)
    rows = [_cells(each, total) for each in figures]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _cells(each: SourceFigures, total: int) -> dict[str, str]:
    """A source's cells of the table by column; `total` rows are served by all sources."""
    return {
        "source": each.name,
        "documents": f"{each.documents:,}",
        "held out": f"{each.held_out:,}",
        "copies": f"{each.copies:,}",
        "tokens": f"{each.tokens:,}",
        "bytes/token": f"{each.bytes / each.tokens:.2f}",
        "rows": f"{each.rows:,}",
        "full": f"{each.tokens / each.positions:.2%}",
        "of all rows": f"{each.served / total:.1%}",
        "epochs": f"{each.served / each.rows:.2f}",
    }


def _summary(run: Run, tokenizer: Tokenizer, figures: Sequence[SourceFigures]) -> str:
    data, steps = run.data, run.train.steps
    length = data.sequence_length
    total = sum(each.served for each in figures)
    full, predicting = (
        sum(each.served * getattr(each, name) / each.positions for each in figures) / total
        for name in ("tokens", "predicted")
    )
    longer = sum(each.longer for each in figures)
    documents = sum(each.documents for each in figures)
    how = "packed into rows" if data.is_packed else "joined end to end"
    return "\n".join(
        [
            f"{steps:,} steps of {data.batch_size:,} rows of {length:,} positions: "
            f"{steps * data.batch_size * length:,}, of which {full:.2%} hold a token and "
            f"{predicting:.2%} predict one",
            f"documents are {how}; {longer:,} of {documents:,} are longer than a row",
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model "
            f"{run.model.vocab_size:,}",
        ]
    )


def _lines(pieces: Sequence[Piece], tokenizer: Tokenizer, num_characters: int) -> list[str]:
    """A line for each piece; text is quoted, for it may move a terminal's cursor."""
    lines = []
    for piece in pieces:
        text = tokenizer.decode(piece.tokens[: len(piece.tokens) - piece.is_end].tolist())
        if len(text) > num_characters:
            kept = num_characters - len(CUT)
            text = text[: kept - kept // 3] + CUT + text[len(text) - kept // 3 :]
        border = "| document ends" if piece.is_end else "| goes on elsewhere"
        lines.append(f"{len(piece.tokens):>7} tokens  {text!r} {border}")
    return lines
