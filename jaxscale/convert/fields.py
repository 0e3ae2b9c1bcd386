"""A config.json of Hugging Face, of which every field is either read or known not to matter.

A field that a model's file lacks takes the default of a class of transformers there, which differs
between versions. Here it is refused, unless the family states what its absence meant.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscale.types import InputError, check_type

MISSING = object()
MAX_COUNT = 1 << 20  # of layers, heads or experts: each is listed
# They change nothing of what a trained model computes.
IGNORED = {
    "_attn_implementation",
    "_experts_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bos_token_id",
    "dropout",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "experts_implementation",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "label2id",
    "model_type",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "resid_pdrop",
    "router_aux_loss_coef",
    "sep_token_id",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class Fields:
    """The fields of a JSON object, each to be taken once.

    Args:
        values: the object.
        where: the file, and the field in it, for messages.
        ignored: fields that need not be taken.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        ignored: frozenset[str] | set[str] = frozenset(),
    ):
        self._left = dict(values)
        self._ignored = ignored
        self._where = where

    def take(self, name: str, kind: Any, absent: Any = MISSING) -> Any:
        """The value of a field.

        Args:
            name: of the field.
            kind: its type; floats may be written as integers, and lists are given as tuples.
            absent: what it means that the file lacks the field, or has null where `kind` excludes
                it; without it the field is required.
        Raises:
            InputError: the field is missing or of another type.
        """
        value = self._left.pop(name, MISSING)
        if value is MISSING or (value is None and not _may_be_none(kind)):
            if absent is MISSING:
                expected = f"a value of type {_shown(kind)}; no default is assumed"
                raise InputError(self.place(name), None, expected)
            return absent
        value = tuple(value) if isinstance(value, list) else value
        check_type(self.place(name), value, kind)
        if value in (math.inf, -math.inf) or value != value:
            raise InputError(self.place(name), value, "a finite number")
        return value

    def count(self, name: str, absent: Any = MISSING) -> int:
        """Takes a field that counts something; arguments and errors as `take`."""
        value = self.take(name, int, absent)
        if value is not absent and not 0 < value <= MAX_COUNT:
            raise InputError(self.place(name), value, f"a number from 1 to {MAX_COUNT}")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Takes a field that must have one of these values, or be absent or null."""
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            expected = f"{' or '.join(map(repr, allowed))}: nothing else is implemented"
            raise InputError(self.place(name), value, expected)

    def choose(self, name: str, meanings: Mapping[str, str]) -> str:
        """Takes a required field of text and returns what its value means."""
        value = self.take(name, str)
        if value not in meanings:
            raise InputError(self.place(name), value, f"one of {', '.join(sorted(meanings))}")
        return meanings[value]

    def place(self, name: str) -> str:
        """The file and the field, as messages name them."""
        return f"{self._where}: {name}"

    def finish(self) -> None:
        """Raises InputError if a field has not been taken."""
        for name in sorted(self._left.keys() - self._ignored):
            value = self._left[name]
            expected = "no such field: it is unknown for this model_type and may change the model"
            raise InputError(self.place(name), value, expected)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError, which names it, where there is none."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(file), None, f"a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise InputError(str(file), values, "a JSON object")
    return values


def _may_be_none(kind: Any) -> bool:
    return kind is Any or type(None) in getattr(kind, "__args__", ())


def _shown(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
