"""Tokenizers, and the training of new ones.

They are raw bytes, files of Hugging Face's `tokenizers` and SentencePiece models.
"""

import contextlib
import dataclasses
import io
import itertools
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from jaxscale.data.sources import Source, read_documents
from jaxscale.data.split import check_held_out_fraction, hash_text, is_held_out
from jaxscale.data.tokenizer_kinds import (
    END_OF_TEXT,
    HUGGING_FACE_FILE,
    SENTENCE_PIECE_FILE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from jaxscale.types import InputError, check_choice, check_types

SMALLEST_TRAINED = 260
# SentencePiece's trainer leaves out, and only logs, lines that are longer than it is told or that
# hold the character by which it stands for unknown ones.
MAX_LINE_BYTES = 1 << 30  # the most that it takes
RESERVED = "\u2585"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to load.

    Args:
        kind: `byte`, `huggingface` (a tokenizer.json) or `sentencepiece` (a tokenizer.model).
        path: the file, or the folder that holds it under its usual name; None for `byte`.
        eos_token: the token that ends a document, for `huggingface`.
        bos_token: the token with which every text begins, for `huggingface`; None for none.
    """

    kind: Literal["byte", "huggingface", "sentencepiece"] = "byte"
    path: str | None = None
    eos_token: str = END_OF_TEXT
    bos_token: str | None = None

    def __post_init__(self):
        check_types(self)
        if (self.path is None) != (self.kind == "byte"):
            wanted = "no path" if self.kind == "byte" else "the tokenizer's file or folder"
            expected = f"{wanted} for kind={self.kind!r}"
            raise InputError("TokenizerConfig.path", self.path, expected)


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` names.

    Raises:
        InputError: the file is missing or is not such a tokenizer.
    """
    if config.kind == "byte":
        return ByteTokenizer()
    if config.kind == "huggingface":
        file = _find(config.path, HUGGING_FACE_FILE)
        text = _read_text(file)
        return HuggingFaceTokenizer(text, config.eos_token, config.bos_token, path=str(file))
    file = _find(config.path, SENTENCE_PIECE_FILE)
    return SentencePieceTokenizer(_read(file), path=str(file))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises InputError if a model with `vocab_size` has fewer rows than `tokenizer` has tokens."""
    if tokenizer.vocab_size > vocab_size:
        equation = f"{vocab_size} >= {tokenizer.vocab_size} does not hold"
        raise InputError("model.vocab_size", vocab_size, f"at least the tokenizer's: {equation}")


def check_tokenizer(state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Checks that a training read its text with `tokenizer`.

    Args:
        state: the state of the training's loader; one that names no tokenizer passes.
        tokenizer: the tokenizer to compare with.

    Raises:
        InputError: the training read its text with another tokenizer.
    """
    trained = state.get("depends_on", {}).get("tokenizer", tokenizer.fingerprint)
    if trained != tokenizer.fingerprint:
        expected = f"the tokenizer that the model was trained with, of fingerprint {trained}"
        raise InputError("TokenizerConfig", tokenizer.fingerprint, expected)


def train_tokenizer(
    *,
    sources: tuple[Source, ...],
    output: str,
    vocab_size: int,
    kind: Literal["bpe", "sentencepiece"] = "bpe",
    held_out_fraction: float = 0.0,
) -> Tokenizer:
    """Trains a tokenizer and writes it to the folder `output`; the same text gives the same file.

    Args:
        sources: the text.
        output: folder for tokenizer.json (`bpe`) or tokenizer.model (`sentencepiece`).
        vocab_size: number of tokens, with the 256 bytes and the special tokens.
        kind: byte-level BPE of the `tokenizers` library, or a SentencePiece unigram model with
            bytes to fall back on. (The unigram trainer of `tokenizers` is not offered: it gives
            another vocabulary each time.)
        held_out_fraction: leaves out the documents that a DataConfig with this fraction holds out.

    Raises:
        InputError: no text, a vocabulary too small or too large for it, or `output` cannot be
            written.

    Source: Sennrich et al. 2016, arXiv 1508.07909 (BPE); Kudo and Richardson 2018, arXiv 1808.06226
        (SentencePiece).
    """
    check_choice("kind", kind, ("bpe", "sentencepiece"))
    check_held_out_fraction("held_out_fraction", held_out_fraction)
    if vocab_size < SMALLEST_TRAINED:
        expected = f"at least {SMALLEST_TRAINED}: the bytes and the special tokens"
        raise InputError("vocab_size", vocab_size, expected)
    texts = _training_texts(sources, held_out_fraction)
    train = _train_bpe if kind == "bpe" else _train_sentencepiece
    tokenizer = train(texts, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        expected = f"a size that the text supports, at most {tokenizer.vocab_size}"
        raise InputError("vocab_size", vocab_size, expected)
    tokenizer.save(output)
    print(f"tokenizer of {tokenizer.vocab_size} tokens: {output}")
    return tokenizer


def _training_texts(sources: Iterable[Source], held_out_fraction: float) -> Iterator[str]:
    """The texts that are not held out.

    Raises:
        InputError: there are none. The iterator raises it when a text is not UTF-8.
    """
    texts = _kept_texts(sources, held_out_fraction)
    first = next(texts, None)
    if first is None:
        raise InputError("sources", sources, "at least one document with text that is not held out")
    return itertools.chain([first], texts)


def _kept_texts(sources: Iterable[Source], held_out_fraction: float) -> Iterator[str]:
    for source in sources:
        for document in read_documents(source):
            hashes = [hash_text(document.text)]
            if not is_held_out(hashes, held_out_fraction)[0]:
                yield document.text


def _train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text can be spelt, because the 256 bytes are tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str())


def _train_sentencepiece(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A unigram model that normalises nothing and spells unknown characters as bytes."""
    lines = (line for text in texts for line in _sentencepiece_lines(text))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            max_sentence_length=MAX_LINE_BYTES,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            byte_fallback=True,
            num_threads=1,  # several threads would add up in an order that differs between runs
            minloglevel=2,
        )
    except RuntimeError as error:
        if "ocabulary" not in str(error):
            given = "text from which SentencePiece learns nothing"
            raise InputError("sources", given, f"text with words in it ({error})") from error
        expected = f"a size that the text supports ({error})"
        raise InputError("vocab_size", vocab_size, expected) from error
    return SentencePieceTokenizer(model.getvalue())


def _sentencepiece_lines(text: str) -> Iterator[str]:
    """The lines of a text as SentencePiece's trainer takes them, so that it leaves none out."""
    max_characters = MAX_LINE_BYTES // 4  # of UTF-8's at most 4 bytes
    for line in text.replace(RESERVED, "\n").split("\n"):
        for first in range(0, len(line), max_characters):
            yield line[first : first + max_characters]


def _find(path: str, name: str) -> Path:
    """The file at `path`, or of this name in the folder there."""
    file = Path(path).expanduser()
    with _unreadable_named(file):
        found = file / name if file.is_dir() else file
        mode = found.stat().st_mode
    if not stat.S_ISREG(mode):  # a pipe would be waited for
        raise InputError("TokenizerConfig.path", str(found), "a regular file, or its folder")
    return found


def _read(file: Path) -> bytes:
    with _unreadable_named(file):
        return file.read_bytes()


def _read_text(file: Path) -> str:
    """The text of a file, without the byte order mark that some editors write."""
    try:
        return _read(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        expected = f"a tokenizer.json, which is text ({error.reason})"
        raise InputError("TokenizerConfig.path", str(file), expected) from error


@contextlib.contextmanager
def _unreadable_named(file: Path) -> Iterator[None]:
    """Turns the file system's refusal to read into InputError."""
    try:
        yield
    except OSError as error:
        expected = (
            f"a file that can be read ({error.strerror}); "
            "`jaxscale tokenizer FILE.gin` trains a new one"
        )
        raise InputError("TokenizerConfig.path", error.filename or str(file), expected) from error
