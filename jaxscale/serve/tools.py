"""Calls of tools in an answer, in the forms in which chat templates teach models to write them."""

import dataclasses
import json
import uuid
from collections.abc import Sequence
from typing import Any

from jaxscale.serve.grammar import GrammarConfig, json_grammar
from jaxscale.types import InputError


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that a model has made.

    Args:
        name: of the function.
        arguments: JSON.
        id: by which the client's answer names it.
    """

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call-{uuid.uuid4().hex}")

    def json(self) -> dict[str, Any]:
        """In OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclasses.dataclass(frozen=True)
class ToolForm:
    """How calls stand in a text.

    Args:
        begin: the text before one; "" for a form in which a call is the whole answer.
        end: the text behind it; "" for the end of the answer.
        sign: what a chat template that teaches this form contains.
    """

    begin: str
    end: str
    sign: str


BARE = ToolForm("", "", "<|python_tag|>")
FORMS = (
    ToolForm("<|tool_call|>", "<|/tool_call|>", "<|tool|>"),  # Phi-4-mini
    ToolForm("[TOOL_CALLS]", "", "[TOOL_CALLS]"),  # Mistral
    ToolForm("<tool_call>", "</tool_call>", "<tool_call>"),  # Hermes and Qwen
    BARE,  # Llama 3.1
)


def find_form(template: str) -> ToolForm | None:
    """The form that a chat template's source teaches; None where it teaches none."""
    return next((form for form in FORMS if form.sign in template), None)


def parse(text: str) -> list[ToolCall]:
    """The calls in a text of JSON, one or a list; none where it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) for call in calls):
        return []
    read = [_read(call) for call in calls]
    return [] if None in read else read


def _read(call: dict[str, Any]) -> ToolCall | None:
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters"))
    if not isinstance(name, str) or arguments is None:
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name, arguments)


class ToolStream:
    """Tells an answer's calls from its text, piece by piece.

    Text is held back while it may be the beginning of a call. What looks like one and is none is
    text.

    Args:
        form: of the calls.
    """

    def __init__(self, form: ToolForm):
        self._form = form
        self._held = ""
        self._is_call = False
        self._is_text = False  # whether a bare form has said anything, which no call follows
        self.num_calls = 0

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """(text that is no call, calls that have ended) of what is new."""
        self._held += text
        said, calls = "", []
        while step := self._step():
            said += step[0]
            calls += step[1]
        self.num_calls += len(calls)
        return said, calls

    def flush(self) -> tuple[str, list[ToolCall]]:
        """What was held back, once there is no more."""
        text, self._held = self._held, ""
        calls = parse(text) if self._is_call else []
        self.num_calls += len(calls)
        if calls:
            return "", calls
        return (self._form.begin if self._is_call else "") + text, []

    def _step(self) -> tuple[str, list[ToolCall]] | None:
        """What can be told of the text that is held; None where more has to come first."""
        form, held = self._form, self._held
        if self._is_call:
            if not form.end or form.end not in held:
                return None
            inside, self._held = held.split(form.end, 1)
            self._is_call = False
            calls = parse(inside)
            return ("", calls) if calls else (form.begin + inside + form.end, [])
        if not form.begin:
            return self._bare()
        before, found, rest = held.partition(form.begin)
        if found:
            self._is_call, self._held = True, rest
            return before, []
        kept = _length_of_beginning(held, form.begin)
        said, self._held = held[: len(held) - kept], held[len(held) - kept :]
        return (said, []) if said else None

    def _bare(self) -> tuple[str, list[ToolCall]] | None:
        text = self._held.lstrip()
        if not text:
            return None  # it may come before a call
        if text[0] in "{[" and not self._is_text:
            self._is_call, self._held = True, text
            return "", []
        self._is_text = True
        said, self._held = self._held, ""
        return said, []


def _length_of_beginning(text: str, marker: str) -> int:
    """Characters at the end of a text with which the marker may begin."""
    lengths = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(marker[:n])), 0)


def forced_grammar(tools: Sequence[dict[str, Any]], name: str | None) -> GrammarConfig:
    """The grammar of an answer that is one call.

    Args:
        tools: in OpenAI's form.
        name: of the function; None for any of them.
    Raises:
        InputError: there is no such function, or one has no name.
    """
    functions = [tool.get("function") for tool in tools]
    named = [each for each in functions if isinstance(each, dict) and "name" in each]
    if len(named) < len(functions):
        raise InputError("tools", list(tools), "functions with names")
    names = [function["name"] for function in named]
    chosen = [each for each in named if name in (None, each["name"])]
    if not chosen:
        raise InputError("tool_choice", name, f"one of {names}")
    schemas = [_schema(function) for function in chosen]
    return json_grammar({"anyOf": schemas}, is_compact=True)


def _schema(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def chosen_name(
    tool_choice: str | dict[str, Any] | None,
) -> tuple[bool, str | None]:
    """(whether a call is demanded, of which function or None for any).

    Raises:
        InputError: it is nothing that OpenAI's API knows.
    """
    if tool_choice in (None, "auto", "none"):
        return False, None
    if tool_choice == "required":
        return True, None
    function = tool_choice.get("function") if isinstance(tool_choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        expected = '"none", "auto", "required" or a function'
        raise InputError("tool_choice", tool_choice, expected)
    return True, name
