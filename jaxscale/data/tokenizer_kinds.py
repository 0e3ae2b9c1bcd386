"""What a tokenizer does, and its kinds: bytes, a tokenizer.json, a SentencePiece model."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from jaxscale.data.sources import check_characters
from jaxscale.types import InputError

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
HUGGING_FACE_FILE = "tokenizer.json"
SENTENCE_PIECE_FILE = "tokenizer.model"
NEW = "a new tokenizer"
NEVER = -1e4  # as log-probability of a piece: any other way to spell a text is better
NUM_SHOWN = 80  # characters of a text that an error quotes
RARE = "\U000103a0"  # a letter of Old Persian


class Tokenizer(Protocol):
    """Text to token ids and back. `eos_id` ends a document; no text encodes to it."""

    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The token ids of a text.

        Raises:
            InputError: the text has half a character, such as a stray byte of the command line.
        """
        ...

    def encode_part(self, text: str) -> list[int]:
        """As `encode`, of a text that begins nothing; errors as there."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, as integer arrays."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids.

        Bytes that are no UTF-8 become U+FFFD. Ids beyond the vocabulary are left out.
        """
        ...

    def num_bytes(self, id: int) -> int:
        """Bytes of UTF-8 that a token stands for at the beginning of a text.

        One for unknown characters counts as it decodes.
        """
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's file to a folder, which is made if need be."""
        ...


def ending_token(tokenizer: Tokenizer, text: str | None, parameter: str) -> int:
    """The special token that ends an answer.

    Args:
        tokenizer: that has it.
        text: of the token; None for the one that ends a document.
        parameter: that gives the text, for errors.
    Raises:
        InputError: the tokenizer has no such special token.
    """
    if text is None:
        return tokenizer.eos_id
    special = getattr(tokenizer, "special_tokens", {})
    if text not in special:
        raise InputError(parameter, text, f"one of {sorted(special)}")
    return special[text]


class ByteTokenizer:
    """The bytes of UTF-8, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "byte"

    def encode(self, text: str) -> list[int]:
        check_characters("text", text[:NUM_SHOWN], text)
        return list(text.encode())

    encode_part = encode

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        known = bytes(id for id in ids if id < self.eos_id)
        return known.decode(errors="replace")

    def num_bytes(self, id: int) -> int:
        return int(id < self.eos_id)

    def save(self, directory: str | Path) -> None:
        """Writes nothing: there is nothing to know."""


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        serialized: the text of its tokenizer.json.
        eos_token: the token that ends a document.
        bos_token: the token with which every text begins; None for none.
        path: where it comes from, for errors.
    """

    def __init__(
        self,
        serialized: str,
        eos_token: str = END_OF_TEXT,
        bos_token: str | None = None,
        *,
        path: str = NEW,
    ):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(_guarded(serialized, eos_token))
        except Exception as error:  # the library raises bare Exception
            expected = f"a tokenizer.json ({error})"
            raise InputError("TokenizerConfig.path", path, expected) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id = self._tokenizer.token_to_id(eos_token)
        if self.eos_id is None:
            raise InputError("TokenizerConfig.eos_token", eos_token, "a token of the vocabulary")
        # Text that spells a special token must not become one, least of all the end of a document,
        # which some files do not mark as special.
        ending = tokenizers.AddedToken(eos_token, normalized=False, special=True)
        self._tokenizer.add_special_tokens([ending])
        self._tokenizer.encode_special_tokens = True
        self._begin = [] if bos_token is None else [self._tokenizer.token_to_id(bos_token)]
        if None in self._begin:
            raise InputError("TokenizerConfig.bos_token", bos_token, "a token of the vocabulary")
        try:
            spelt = self.encode_part(eos_token)
        except Exception as error:  # the library raises bare Exception
            expected = f"a tokenizer.json that encodes every text ({error})"
            raise InputError("TokenizerConfig.path", path, expected) from error
        if self.eos_id in spelt:
            expected = "a token that no text encodes to; this one is a word of the vocabulary"
            raise InputError("TokenizerConfig.eos_token", eos_token, expected)
        if self._leaves_out_characters():
            logger.warning("%s leaves characters that it does not know out of texts", path)
        # Ids may have gaps, and a model needs a row for the largest.
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        identity = f"{eos_token}\n{serialized}"
        if bos_token is not None:
            identity = f"{bos_token}\n{identity}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._serialized = serialized

    def _leaves_out_characters(self) -> bool:
        """Whether characters without a token vanish; others have one for them, or their bytes."""
        if getattr(self._tokenizer.model, "unk_token", "") is not None:
            return False
        ids = self.encode_part(f"a{RARE}")
        # It vanishes whole, or some of its bytes do.
        return ids == self.encode_part("a") or "\ufffd" in self.decode(ids)

    @property
    def serialized(self) -> str:
        """The text of its tokenizer.json."""
        return self._serialized

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens by their text, which `encode` never gives."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        return self._begin + self.encode_part(text)

    def encode_part(self, text: str) -> list[int]:
        check_characters("text", text[:NUM_SHOWN], text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_trained(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a chat's text, in which special tokens are tokens, and which are in a span.

        Args:
            text: of a chat; nothing is put before it.
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

    def num_bytes(self, id: int) -> int:
        text = self.decode([id])
        if "\ufffd" not in text:
            return len(text.encode())
        # It has a part of a character. Then it is named `<0xE6>`, or by a letter for each byte.
        name = self._tokenizer.id_to_token(id)
        return 1 if name.startswith("<0x") else len(name)

    def save(self, directory: str | Path) -> None:
        _write(Path(directory).expanduser(), HUGGING_FACE_FILE, self._serialized.encode())


def _guarded(serialized: str, eos_token: str) -> str:
    """A tokenizer.json whose unigram model, if it has one, takes no special token from a text.

    Such a model has special tokens among its pieces, often with the best score of all.

    Raises:
        ValueError, LookupError, TypeError: it is no tokenizer.json.
    """
    if '"Unigram"' not in serialized:
        return serialized
    content = json.loads(serialized)
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    for piece in content["model"]["vocab"]:
        if piece[0] in special | {eos_token}:
            piece[1] = NEVER
    return json.dumps(content)


class SentencePieceTokenizer:
    """A SentencePiece model.

    Args:
        serialized: the bytes of its tokenizer.model.
        path: where it comes from, for errors.
    """

    def __init__(self, serialized: bytes, *, path: str = NEW):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except (RuntimeError, UnicodeDecodeError) as error:  # the message may quote damaged bytes
            expected = f"a SentencePiece model ({error})"
            raise InputError("TokenizerConfig.path", path, expected) from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            expected = "a SentencePiece model with the control symbol </s>"
            raise InputError("TokenizerConfig.path", path, expected)
        self.fingerprint = hashlib.sha256(serialized).hexdigest()
        self._serialized = serialized

    def pieces(self) -> list[str]:
        """Each token as the model spells it; nothing for one that spells no text."""
        model = self._processor
        spells_none = [
            model.is_control(id) or model.is_unknown(id) for id in range(self.vocab_size)
        ]
        return ["" if none else model.id_to_piece(id) for id, none in enumerate(spells_none)]

    def encode(self, text: str) -> list[int]:
        check_characters("text", text[:NUM_SHOWN], text)
        return self._processor.encode(text)

    encode_part = encode

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._processor.encode(list(texts))
        return [np.array(ids, np.uint32) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(id) for id in ids if id < self.vocab_size]
        return self._processor.decode(known)

    def num_bytes(self, id: int) -> int:
        return 1 if self._processor.is_byte(id) else len(self.decode([id]).encode())

    def save(self, directory: str | Path) -> None:
        _write(Path(directory).expanduser(), SENTENCE_PIECE_FILE, self._serialized)


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
