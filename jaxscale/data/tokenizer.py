"""Tokenizers, and the training of new ones.

They are raw bytes, files of Hugging Face's `tokenizers` and SentencePiece models.
"""

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import sentencepiece
import tokenizers

from jaxscale.data.sources import Source, num_bytes
from jaxscale.data.split import check_held_out_fraction, hash_key, is_held_out
from jaxscale.types import InputError, check_choice, check_types

END_OF_TEXT = "<|endoftext|>"
HUGGING_FACE_FILE = "tokenizer.json"
SENTENCE_PIECE_FILE = "tokenizer.model"
SMALLEST_TRAINED = 260


class Tokenizer(Protocol):
    """Text to token ids and back. `eos_id` ends a document; no text encodes to it."""

    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, as integer arrays."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids.

        Bytes that are no UTF-8 become U+FFFD. Ids beyond the vocabulary are left out.
        """
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's file to a folder, which is made if need be."""
        ...


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
        content = _read(config.path, HUGGING_FACE_FILE)
        text = _text(config.path, content)
        return HuggingFaceTokenizer(text, config.eos_token, config.bos_token)
    return SentencePieceTokenizer(_read(config.path, SENTENCE_PIECE_FILE))


def parse(serialized: str) -> tokenizers.Tokenizer:
    """The tokenizer that the text of a tokenizer.json is; raises InputError if it is none."""
    try:
        return tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises bare Exception
        expected = f"a tokenizer.json ({error})"
        raise InputError("TokenizerConfig.path", serialized[:40], expected) from error


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises InputError if a model with `vocab_size` has fewer rows than `tokenizer` has tokens."""
    if tokenizer.vocab_size > vocab_size:
        equation = f"{vocab_size} >= {tokenizer.vocab_size} does not hold"
        raise InputError("model.vocab_size", vocab_size, f"at least the tokenizer's: {equation}")


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


class ByteTokenizer:
    """The bytes of UTF-8, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "byte"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        known = bytes(id for id in ids if id < self.eos_id)
        return known.decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        """Writes nothing: there is nothing to know."""


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        serialized: the text of its tokenizer.json.
        eos_token: the token that ends a document.
        bos_token: the token with which every text begins; None for none.
    """

    def __init__(
        self,
        serialized: str,
        eos_token: str = END_OF_TEXT,
        bos_token: str | None = None,
    ):
        self._tokenizer = parse(serialized)
        # Text that spells a special token must not become one, least of all the end of a document.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.special_tokens = tuple(token.content for token in added if token.special)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id = self._tokenizer.token_to_id(eos_token)
        if self.eos_id is None:
            raise InputError("TokenizerConfig.eos_token", eos_token, "a token of the vocabulary")
        self._begin = [] if bos_token is None else [self._tokenizer.token_to_id(bos_token)]
        if None in self._begin:
            raise InputError("TokenizerConfig.bos_token", bos_token, "a token of the vocabulary")
        # Ids may have gaps, and a model needs a row for the largest.
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        identity = f"{eos_token}\n{serialized}"
        if bos_token is not None:
            identity = f"{bos_token}\n{identity}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._serialized = serialized

    def encode(self, text: str) -> list[int]:
        return self._begin + self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str) -> list[int]:
        """The token ids of a text in which the special tokens that it spells are tokens.

        None is put before it.

        For text of a chat's template, in which nothing of a user's may spell one.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_trained(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text as `encode_special` gives them, and which lie in one of the spans.

        Args:
            text: of a chat.
            spans: first and last character, the latter excluded, of what is trained.
        Returns:
            (uint32 ids, bool of the same length); a token is in a span if all of it is.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        is_trained = [
            any(first <= begin and end <= last for first, last in spans)
            for begin, end in encoding.offsets
        ]
        return np.array(encoding.ids, np.uint32), np.array(is_trained, bool)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(self._begin + encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        _write(Path(directory).expanduser(), HUGGING_FACE_FILE, self._serialized.encode())


class SentencePieceTokenizer:
    """A SentencePiece model.

    Args:
        serialized: the bytes of its tokenizer.model.
    """

    def __init__(self, serialized: bytes):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except RuntimeError as error:
            expected = f"a SentencePiece model ({error})"
            raise InputError("TokenizerConfig.path", serialized[:20], expected) from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            given = "a SentencePiece model without </s>"
            raise InputError("TokenizerConfig.path", given, "one that has it")
        self.fingerprint = hashlib.sha256(serialized).hexdigest()
        self._serialized = serialized

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._processor.encode(list(texts))
        return [np.array(ids, np.uint32) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(id) for id in ids if id < self.vocab_size]
        return self._processor.decode(known)

    def save(self, directory: str | Path) -> None:
        _write(Path(directory).expanduser(), SENTENCE_PIECE_FILE, self._serialized)


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
        for document in source.documents():
            has_text = num_bytes(document) > 0
            hashes = [hash_key(document.key)]
            if has_text and not is_held_out(hashes, held_out_fraction)[0]:
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
    lines = (line for text in texts for line in text.splitlines() if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
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
        expected = f"a size that the text supports ({error})"
        raise InputError("vocab_size", vocab_size, expected) from error
    return SentencePieceTokenizer(model.getvalue())


def _read(path: str, name: str) -> bytes:
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / name
    try:
        return file.read_bytes()
    except OSError as error:
        expected = (
            f"a file that can be read ({error.strerror}); "
            "`jaxscale tokenizer FILE.gin` trains a new one"
        )
        raise InputError("TokenizerConfig.path", str(file), expected) from error


def _text(path: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        expected = f"a tokenizer.json, which is text ({error.reason})"
        raise InputError("TokenizerConfig.path", path, expected) from error


def _write(directory: Path, name: str, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = directory / f".{name}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(directory / name)
    except OSError as error:
        expected = f"a folder that can be written ({error.strerror})"
        raise InputError("output", str(directory), expected) from error
