"""Pairs of answers to one prompt, of which one was preferred."""

import dataclasses
from typing import TYPE_CHECKING

from jaxscale.data.chats import ASSISTANT, Line, TemplatedSource, chat_document
from jaxscale.data.sources import ChatDocument
from jaxscale.types import InputError

if TYPE_CHECKING:
    from jaxscale.data.chat_template import ChatTemplate, Message


@dataclasses.dataclass(frozen=True)
class PreferenceSource(TemplatedSource):
    """One pair per line of JSON, with `chosen` and `rejected`; extra `chat`.

    Each is a chat that ends with the assistant's answer, a list of messages with a `role` and its
    `content`; all messages before the two answers are the same. In a row the two are documents that
    do not see one another, the chosen one first, and the tokens of the answers alone have a weight.
    A pair that is longer than a row is left out.

    Args:
        paths: files and folders.
        tokenizer: folder of Hugging Face with the tokenizer of the run and its chat template.
        patterns: which files of a folder count.
    """

    def _document(
        self,
        line: Line,
        template: "ChatTemplate",
        special: list[str],
    ) -> ChatDocument:
        chosen, rejected = (line.messages(name, special) for name in ("chosen", "rejected"))
        _check_pair(chosen, rejected, line.label)
        first, second = (chat_document(template, chat, line.label) for chat in (chosen, rejected))
        begin = len(first.text)
        answer, (start, end) = first.trained[-1], second.trained[-1]
        spans = answer, (begin + start, begin + end)
        return ChatDocument(line.key, first.text + second.text, spans, begin)


def _check_pair(
    chosen: "list[Message]",
    rejected: "list[Message]",
    label: str,
) -> None:
    """Raises InputError unless both end with an answer to the same messages."""
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        if len(chat) < 2 or chat[-1]["role"] != ASSISTANT:
            expected = "a message or more, and the assistant's answer to them"
            raise InputError(f"{label}: {name}", chat, expected)
    if chosen[:-1] != rejected[:-1]:
        expected = f"before the answer the messages of `chosen`, {chosen[:-1]}"
        raise InputError(f"{label}: rejected", rejected[:-1], expected)
