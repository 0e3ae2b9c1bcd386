"""Chat templates: from messages to the tokens that a model was trained to answer.

A template is a program in Jinja that a model's folder brings. It runs in Jinja's sandbox, which
gives it the messages and nothing else; needs the extra `serve`.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxscale.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from jaxscale.types import InputError

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
BREAK = "\ue0ff"  # breaks up what spells a special token in a message; of Unicode's private area


class ChatTemplate:
    """Messages to tokens.

    Text of a message that spells a special token stays text: only the template can write one.

    Args:
        source: of the template.
        tokenizer: of the model.
        variables: further ones of the template, such as `bos_token`.
    Raises:
        InputError: the source is no Jinja template.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        variables: dict[str, Any] | None = None,
    ):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError("chat_template", source[:40], f"a Jinja template ({error})") from error
        self._tokenizer = tokenizer
        self._variables = variables or {}
        is_known = isinstance(tokenizer, HuggingFaceTokenizer)
        self._special = tokenizer.special_tokens if is_known else {}

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The text of a chat, up to where the assistant answers.

        Raises:
            InputError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=True,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            expected = f"messages that the chat template takes ({error})"
            raise InputError(
                "messages", [each.get("role") for each in messages], expected
            ) from error

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """The tokens of a chat; Args and Raises as `render`."""
        text = self.render(self._broken_up(messages), tools=self._broken_up(tools))
        tokens, rest = [], text
        while rest:
            found = [(rest.find(each), -len(each), each) for each in self._special if each in rest]
            start, _, special = min(found, default=(len(rest), 0, ""))
            if start:
                tokens += self._tokenizer.encode(rest[:start].replace(BREAK, ""))
            if special:
                tokens.append(self._special[special])
            rest = rest[start + len(special) :]
        return tokens

    def _broken_up(self, value: Any) -> Any:
        """The value, in whose texts no special token is spelt."""
        if isinstance(value, str):
            for special in self._special:
                value = value.replace(special, special[:1] + BREAK + special[1:])
            return value
        if isinstance(value, dict):
            return {key: self._broken_up(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._broken_up(each) for each in value]
        return value


def find_chat_template(folder: str | Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template beside a tokenizer's file; None where there is none.

    Raises:
        InputError: it cannot be read or is no template.
    """
    folder = Path(folder).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    settings = {}
    if (folder / TOKENIZER_CONFIG).is_file():
        settings = _read_json(folder / TOKENIZER_CONFIG)
    source = settings.get("chat_template")
    if (folder / TEMPLATE_FILE).is_file():
        source = (folder / TEMPLATE_FILE).read_text()
    if not isinstance(source, str):
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    variables = {name: _content(settings[name]) for name in names if settings.get(name)}
    return ChatTemplate(source, tokenizer, variables)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError("tokenizer_config", str(path), f"JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    """The text of a token, which may be written as an object."""
    return token["content"] if isinstance(token, dict) else token


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
