"""The tokenizer of a folder of Hugging Face, and the tokens that end an answer."""

import math
from pathlib import Path

import tokenizers

from jaxscale.convert.fields import read_json
from jaxscale.data.tokenizer import TokenizerConfig, load_tokenizer
from jaxscale.data.tokenizer_kinds import HUGGING_FACE_FILE, SENTENCE_PIECE_FILE
from jaxscale.types import InputError

CONFIG = "config.json"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"


def tokenizer_config(folder: Path) -> TokenizerConfig:
    """The tokenizer of a folder, which begins texts with the token that Hugging Face's does.

    Raises:
        InputError: it has none, it has more tokens than the model, or its end of a document is none
            of config.json's.
    """
    if not (folder / HUGGING_FACE_FILE).exists():
        if (folder / SENTENCE_PIECE_FILE).exists():
            config = TokenizerConfig("sentencepiece", str(folder))
            _check_size(folder, load_tokenizer(config).vocab_size, SENTENCE_PIECE_FILE)
            return config
        expected = f"a folder with {HUGGING_FACE_FILE} or {SENTENCE_PIECE_FILE}"
        raise InputError("source", str(folder), expected)
    file = folder / TOKENIZER_CONFIG
    token = read_json(file).get("eos_token") if file.exists() else None
    token = token.get("content") if isinstance(token, dict) else token
    ends = stop_ids(folder)
    if token is None and ends:
        token = token_of(folder, ends[0])
    if not isinstance(token, str):
        raise InputError(f"{file}: eos_token", token, "the token that ends a document")
    begin = first_token(folder)
    config = TokenizerConfig("huggingface", str(folder), token, begin)
    tokenizer = load_tokenizer(config)
    _check_size(folder, tokenizer.vocab_size, HUGGING_FACE_FILE)
    end = tokenizer.eos_id
    if ends and end not in ends:
        expected = f"the token of one of {CONFIG}'s or {GENERATION_CONFIG}'s eos_token_id, {ends}"
        raise InputError(f"{file}: eos_token", f"{token} ({end})", expected)
    return config


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer, by config.json and generation_config.json.

    Raises:
        InputError: one of them is no token of the model.
    """
    found: list[int] = []
    size = _num_tokens(folder)
    for name in (CONFIG, GENERATION_CONFIG):
        values = read_json(folder / name) if (folder / name).exists() else {}
        ids = values.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        for each in ids:
            if type(each) is not int or not 0 <= each < size:
                expected = f"numbers of tokens, from 0 to vocab_size - 1 = {size - 1}"
                raise InputError(f"{folder / name}: eos_token_id", each, expected)
        found += ids
    return tuple(dict.fromkeys(found))


def first_token(folder: Path) -> str | None:
    """The token that Hugging Face's tokenizer of a folder puts before a text; None for none.

    Raises:
        InputError: the tokenizer.json cannot be read, or it puts several there.
    """
    tokenizer = _serialized(folder)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    beginnings = (n for n in range(len(ids)) if ids[n : n + len(plain)] == plain)
    num_before = next(beginnings, 0)
    if num_before > 1:
        expected = "at most one token before a text"
        raise InputError(str(folder / HUGGING_FACE_FILE), ids[:num_before], expected)
    return tokenizer.id_to_token(ids[0]) if num_before else None


def token_of(folder: Path, token_id: int) -> str | None:
    """The token of an id, by the tokenizer.json of a folder; None where it has none."""
    return _serialized(folder).id_to_token(token_id)


def _num_tokens(folder: Path) -> int | float:
    """How many tokens the model of a folder has; without end where its config.json says nothing."""
    values = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    size = values.get("vocab_size")
    return size if type(size) is int else math.inf


def _check_size(folder: Path, number: int, file: str) -> None:
    """Raises InputError if a tokenizer has more tokens than the model of its folder."""
    size = _num_tokens(folder)
    if number > size:
        expected = f"at least {number}, the tokens of {folder / file}"
        raise InputError(f"{folder / CONFIG}: vocab_size", size, expected)


def _serialized(folder: Path) -> tokenizers.Tokenizer:
    file = folder / HUGGING_FACE_FILE
    try:
        return tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as error:  # the library raises bare Exception
        raise InputError(str(file), None, f"a tokenizer.json ({error})") from None
