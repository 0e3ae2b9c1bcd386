"""Prompts that a model answers while it is trained."""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxscale.data.chats import ASSISTANT, Line, TemplatedSource
from jaxscale.data.sources import ChatDocument
from jaxscale.data.tokenizer_kinds import Tokenizer
from jaxscale.types import InputError

if TYPE_CHECKING:
    from jaxscale.data.chat_template import ChatTemplate


class Prompt(NamedTuple):
    """A chat that waits for the assistant's answer.

    Args:
        key: names it in errors.
        tokens: of the chat, up to where the answer begins.
        line: the JSON object that it was read from: `messages`, and whatever else a reward asks
            for, such as the right answer.
    """

    key: str
    tokens: list[int]
    line: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PromptSource(TemplatedSource):
    """One chat per line of JSON that ends with what the assistant is to answer; extra `chat`.

    `messages` is a list with a `role` and its `content` each. Other fields are for rewards.

    Args:
        paths: files and folders.
        tokenizer: folder of Hugging Face with the tokenizer of the run and its chat template.
        patterns: which files of a folder count.
    """

    def prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt]:
        """The prompts, in the order of their lines; raises InputError for one with an answer."""
        template = self._template()
        for line in self._lines():
            tokens = template.encode(_waiting(line), tokenizer)
            yield Prompt(line.label, tokens, json.loads(line.text))

    def _document(self, line: Line, template: "ChatTemplate") -> ChatDocument:
        text = template.render(_waiting(line), is_reply_next=True)
        return ChatDocument(line.key, text, ())


def _waiting(line: Line) -> list:
    messages = line.messages("messages")
    if not messages or messages[-1]["role"] == ASSISTANT:
        expected = "messages of which the last one waits for the assistant's answer"
        raise InputError(f"{line.label}: messages", messages, expected)
    return messages
