"""Grammars that a continuation has to follow, by llguidance; needs the extra `serve`."""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxscale.data.tokenizer_kinds import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from jaxscale.types import InputError, check_types

WORD = 32  # tokens in a word of a mask
MAX_COMPILED = 64  # grammars that are kept
# Between the parts of a JSON text. Without a limit a model may write spaces until its end.
WHITESPACE = r"[ \n\t]{0,20}"
SPACE_OF_PIECES = "\u2581"


@dataclasses.dataclass(frozen=True)
class GrammarConfig:
    """What a continuation looks like.

    Args:
        kind: of the text: a JSON schema, a regular expression that matches all of the
            continuation, or a context-free grammar in llguidance's form of Lark.
        text: of the grammar.
        is_compact: whether a JSON text has no space between its parts.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    is_compact: bool = False

    def __post_init__(self):
        check_types(self)


class Grammars:
    """Compiles grammars for a tokenizer.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        # The least recently asked for first.
        self._compiled: collections.OrderedDict[GrammarConfig, concurrent.futures.Future]
        self._compiled = collections.OrderedDict()

    def begin(self, config: GrammarConfig) -> "Matcher":
        """The state at the beginning of a continuation; any thread may ask for it.

        A grammar is compiled once. Nobody waits for another one than his own: a large schema takes
        a second, for which the engine must not stand still.

        Raises:
            InputError: the grammar cannot be compiled, or llguidance is not installed.
        """
        with self._lock:
            known = self._compiled.get(config)
            future = known or concurrent.futures.Future()
            self._compiled[config] = future
            self._compiled.move_to_end(config)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        if known is None:
            self._compile_into(future, config)
        compiled = future.result().deep_copy()
        return Matcher(compiled, self.num_words, self._tokenizer.eos_id)

    def _compile_into(self, future: concurrent.futures.Future, config: GrammarConfig) -> None:
        try:
            future.set_result(self._compile(config))
        # Whoever waits would else wait for ever. A panic of llguidance, which is written in Rust,
        # is a BaseException. In this thread `begin` raises it again.
        except BaseException as error:
            with self._lock:
                self._compiled.pop(config, None)
            future.set_exception(error)

    @property
    def num_words(self) -> int:
        """Words of a mask over the vocabulary."""
        return -(-self._tokenizer.vocab_size // WORD)

    @functools.cached_property
    def _vocabulary(self) -> Any:
        llguidance = _import()
        given = self._tokenizer
        if isinstance(given, HuggingFaceTokenizer):
            settings = dict(n_vocab=given.vocab_size, eos_token=given.eos_id)
            return llguidance.LLTokenizer(given.serialized, **settings)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Spelling(given)))

    def _compile(self, config: GrammarConfig) -> Any:
        matcher = _import().LLMatcher
        try:
            if config.kind == "json_schema":
                options: dict[str, Any] = {"whitespace_pattern": WHITESPACE}
                if config.is_compact:
                    options = {"whitespace_flexible": False}
                grammar = matcher.grammar_from_json_schema(config.text, overrides=options)
            elif config.kind == "regex":
                grammar = matcher.grammar_from_regex(config.text)
            else:
                grammar = matcher.grammar_from_lark(config.text)
        except ValueError as error:
            raise InputError("grammar", config.text[:80], f"JSON ({error})") from error
        # Without log messages: the error is in the matcher.
        compiled = matcher(self._vocabulary, grammar, log_level=0)
        if compiled.is_error():
            reason = compiled.get_error().splitlines()[0]
            expected = f"a {config.kind} that can be compiled ({reason})"
            raise InputError("grammar", config.text[:80], expected)
        return compiled


class Matcher:
    """A continuation within its grammar.

    Args:
        matcher: llguidance's.
        num_words: of a mask.
        eos_id: the token that ends a text.
    """

    def __init__(self, matcher: Any, num_words: int, eos_id: int):
        self._matcher = matcher
        self._num_words = num_words
        self._eos_id = eos_id

    def mask(self) -> np.ndarray:
        """A bit for each token that may come next, [words] int32; the end token at an end."""
        found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        words = np.zeros(self._num_words, np.int32)
        words[: len(found)] = found[: self._num_words]
        return words

    def masks(self, drafts: Sequence[int]) -> list[np.ndarray]:
        """The masks before each draft and behind the last.

        They end where a draft is refused or ends the text: nothing behind it can count.
        """
        found, num_taken = [self.mask()], 0
        for draft in drafts:
            is_allowed = (found[-1][draft // WORD] >> (draft % WORD)) & 1
            if not is_allowed or not self._matcher.consume_token(draft):
                break
            num_taken += 1
            if self._matcher.is_stopped():
                break
            found.append(self.mask())
        if num_taken:
            self._matcher.rollback(num_taken)
        return found

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if self._matcher.is_stopped():
            return token == self._eos_id
        return self._matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> None:
        """Takes the token drawn; one that it allows."""
        self._matcher.consume_token(token)

    @property
    def is_stuck(self) -> bool:
        """Whether the grammar has become too complex to be followed any further."""
        return self._matcher.is_error()


class _Spelling:
    """The bytes of each token, as llguidance asks for them."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = None
        self.special_token_ids = [tokenizer.eos_id]
        self.encode = tokenizer.encode
        if isinstance(tokenizer, SentencePieceTokenizer):
            self.tokens = [_bytes_of_piece(piece) for piece in tokenizer.pieces()]
        else:
            self.tokens = [bytes([token]) for token in range(tokenizer.eos_id)] + [b"<eos>"]

    def __call__(self, text: str | bytes) -> list[int]:
        return self.encode(text if isinstance(text, str) else text.decode(errors="replace"))


def _bytes_of_piece(piece: str) -> bytes:
    if piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[1:-1], 16)])
    return piece.replace(SPACE_OF_PIECES, " ").encode()


def _import() -> Any:
    try:
        import llguidance
    except ImportError as error:
        expected = "the extra: pip install 'jaxscale[serve]'"
        raise InputError("grammar", "no module llguidance", expected) from error
    return llguidance


def json_grammar(schema: Any, *, is_compact: bool = False) -> GrammarConfig:
    """The grammar of JSON texts under a schema."""
    return GrammarConfig("json_schema", json.dumps(schema), is_compact)


def choice_grammar(choices: list[str]) -> GrammarConfig:
    """The grammar of one of several texts; raises InputError for none."""
    if not choices:
        raise InputError("structured_outputs", choices, "a choice at least")
    alternatives = " | ".join(json.dumps(choice) for choice in choices)
    return GrammarConfig("lark", f"start: {alternatives}")
