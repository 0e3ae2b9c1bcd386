"""Chats to text by a tokenizer's own jinja template, which is a program that a file brings.

It runs in jinja's sandbox: it reaches no attribute that begins with an underscore and changes
nothing, its ranges share one budget, and the text that it makes is bounded.
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes, visitor
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from jaxscale.data.tokenizer_kinds import Tokenizer
from jaxscale.types import InputError

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
BREAK = "\ue0ff"  # stands in what spells a special token; of Unicode's private area
MAX_SOURCE, MAX_OUTPUT, MAX_STEPS = 1 << 20, 1 << 24, 100_000

LENGTHENING = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}

Message = Mapping[str, str]


class ChatTemplate:
    """How a model was taught to read a chat.

    Args:
        source: the jinja template.
        where: its file and field, for messages.
        tokens: special tokens by the names that templates use, such as `bos_token`.

    Raises:
        InputError: it is no jinja template.
    """

    def __init__(self, source: str, where: str, tokens: Mapping[str, str]):
        self.source = source
        self._where, self._tokens = where, dict(tokens)
        if len(source) > MAX_SOURCE:
            raise InputError(where, f"{len(source)} characters", f"at most {MAX_SOURCE}")
        try:
            self._template = _Environment().from_string(source)
        except jinja2.TemplateError as error:
            raise self._refused(error) from None

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The tokens of a chat, up to where the assistant's next answer begins.

        What spells a special token in a message stays text: only the template can write one.
        Raises as `render`.
        """
        special = getattr(tokenizer, "special_tokens", {})
        # Nothing is put before a text: the template writes what begins it.
        hidden = _broken_up((messages, tools), special)
        rest = self.render(hidden[0], is_reply_next=True, tools=hidden[1])
        tokens = []
        while rest:
            found = [(rest.find(each), -len(each), each) for each in special if each in rest]
            start, _, name = min(found, default=(len(rest), 0, ""))
            if start:
                tokens += tokenizer.encode_part(rest[:start].replace(BREAK, ""))
            if name:
                tokens.append(special[name])
            rest = rest[start + len(name) :]
        return tokens

    def render(
        self,
        messages: Sequence[Message],
        *,
        is_reply_next: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a chat.

        Args:
            messages: each with a `role` ("system", "user" or "assistant") and its `content`.
            tools: what the model may call, as JSON describes it; None for nothing.
            is_reply_next: whether the text ends where the assistant's next answer begins.
        Raises:
            InputError: the template refuses the chat, is wrong or tries what it may not.
        """
        values = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": is_reply_next,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "range": _Range(),
            **self._tokens,
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise SecurityError(f"it prints more than {MAX_OUTPUT} characters")
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self._refused(error) from None
        except (RecursionError, AttributeError) as error:
            raise self._refused(error) from None
        return "".join(pieces)

    def _refused(self, error: Exception) -> InputError:
        reason = f"{type(error).__name__}: {error}"
        return InputError(self._where, reason, "a jinja template that runs in a sandbox")


def _broken_up(value: Any, special: Iterable[str]) -> Any:
    """The value, in whose texts no special token is spelt."""
    if isinstance(value, str):
        for name in special:
            value = value.replace(name, name[:1] + BREAK + name[1:])
        return value
    if isinstance(value, Mapping):
        return {key: _broken_up(each, special) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_broken_up(each, special) for each in value]
    return value


def read_chat_template(folder: Path) -> ChatTemplate:
    """As `find_chat_template`.

    Raises:
        InputError: the folder has no template, or it is no jinja template.
    """
    template = find_chat_template(folder)
    if template is None:
        expected = f"a template, here or in {TEMPLATE}"
        raise InputError(f"{folder / TOKENIZER_CONFIG}: chat_template", None, expected)
    return template


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a folder of Hugging Face: a file of its own, or a tokenizer's field.

    Returns:
        None where it has none.
    Raises:
        InputError: it is no jinja template.
    """
    file = folder / TOKENIZER_CONFIG
    values = json.loads(file.read_text()) if file.exists() else {}
    tokens = {}
    for name, value in values.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            tokens[name] = token
    if (folder / TEMPLATE).exists():
        return ChatTemplate((folder / TEMPLATE).read_text(), str(folder / TEMPLATE), tokens)
    source = values.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    where = f"{file}: chat_template"
    return ChatTemplate(source, where, tokens) if isinstance(source, str) else None


class _Environment(ImmutableSandboxedEnvironment):
    """The names that templates of Hugging Face expect, and nothing that makes very long text."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.globals = {
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
            "namespace": self.globals["namespace"],
            "dict": dict,
        }
        self.filters |= {"tojson": _to_json, "replace": _replace, "join": _join}
        for name in ("center", "indent", "wordwrap", "format", "xmlattr", "pprint"):
            del self.filters[name]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _ConcatToAdd().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raises where jinja would print nothing."""
        raise SecurityError(f"attribute {attribute} of {type(obj).__name__}")

    def call_binop(
        self,
        context: Any,
        operator: str,
        left: Any,
        right: Any,
    ) -> Any:
        """Arithmetic of numbers, and sums of short text."""
        are_numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or not (are_numbers or operator == "+"):
            names = type(left).__name__, type(right).__name__
            raise SecurityError(f"operator {operator} of {' and '.join(names)}")
        if not are_numbers:
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, but no method of text that makes it longer without a bound."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            if name in LENGTHENING:
                raise SecurityError(f"the method {name} of text")
            if name in ("replace", "join"):
                bounded = _replace if name == "replace" else lambda text, of: _join(of, text)
                return bounded(owner, *args)
        return super().call(context, function, *args, **kwargs)


class _ConcatToAdd(visitor.NodeTransformer):
    """Makes `a ~ b` a sum of text, for only operators can be bounded."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """The sum of what it joins."""
        texts = [
            nodes.Filter(self.visit(each), "string", [], [], None, None) for each in node.nodes
        ]
        joined: nodes.Expr = texts[0]
        for text in texts[1:]:
            joined = nodes.Add(joined, text)
        return joined


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT:
        raise SecurityError(f"it makes more than {MAX_OUTPUT} characters")


def _replace(
    text: Any,
    old: str,
    new: str,
    count: int = -1,
) -> str:
    text, new = str(text), str(new)
    # An empty `old` stands before and behind every character.
    most_places = (len(text) + 1) // max(len(old), 1)
    _check_size(len(text) + most_places * len(new))
    return text.replace(old, new, count)


def _join(values: Any, separator: str = "") -> str:
    texts, size = [], 0
    for value in values:
        texts.append(str(value))
        size += len(texts[-1]) + len(separator)
        _check_size(size)
    return separator.join(texts)


class _Range:
    """`range`, all uses of which in one rendering share a budget of steps."""

    def __init__(self):
        self._left = MAX_STEPS

    def __call__(self, *bounds: int) -> range:
        steps = range(*bounds)
        self._left -= len(steps) + 1
        if self._left < 0:
            raise SecurityError(f"its ranges have more than {MAX_STEPS} steps")
        return steps


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
