"""Pairs of answers to one prompt, of which one was preferred."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxscale.data.chats import ASSISTANT, Line, TemplatedSource, answer_span
from jaxscale.data.sources import ChatDocument
from jaxscale.types import InputError

if TYPE_CHECKING:
    from jaxscale.data.chat_template import ChatTemplate, Message

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreferenceSource(TemplatedSource):
    """One pair per line of JSON, with `chosen` and `rejected`; extra `chat`.

    Each is a chat that ends with the assistant's answer, a list of messages with a `role` and its
    `content`; all messages before the two answers are the same. In a row the two are documents that
    do not see one another, the chosen one first, and the tokens of the answers alone have a weight.
    A pair that is longer than a row is left out, and so is one whose answers are the same. Pairs of
    one prompt are all trained or all held out.

    Args:
        paths: files and folders.
        tokenizer: folder of Hugging Face with the tokenizer of the run and its chat template.
        patterns: which files of a folder count.
    """

    def documents(self) -> Iterator[ChatDocument]:
        """The pairs whose answers differ, in the order of their lines."""
        num_equal = 0
        for document in super().documents():
            if document.text[: document.second] == document.text[document.second :]:
                num_equal += 1
            else:
                yield document
        if num_equal:
            logger.warning("%d pairs have the same answer twice and are left out", num_equal)

    def _document(self, line: Line, template: "ChatTemplate") -> ChatDocument:
        chats = [line.messages(name) for name in ("chosen", "rejected")]
        _check_pair(*chats, line.label)
        texts = [template.render(chat, is_reply_next=False) for chat in chats]
        answer, (start, end) = (
            answer_span(template, chat, len(chat) - 1, text, line.label)
            for chat, text in zip(chats, texts, strict=True)
        )
        place = len(texts[0])
        return ChatDocument(line.key, "".join(texts), (answer, (place + start, place + end)), place)


def _check_pair(
    chosen: "list[Message]",
    rejected: "list[Message]",
    label: str,
) -> None:
    """Raises InputError unless both end with an answer to the same messages."""
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        if len(chat) < 2 or chat[-1]["role"] != ASSISTANT:
            expected = (
                "a message or more and the assistant's answer to them, for no other field is read"
            )
            raise InputError(f"{label}: {name}", chat, expected)
    if len(chosen) != len(rejected):
        expected = f"{len(chosen)}, as many as `chosen` has"
        raise InputError(f"{label}: rejected", f"{len(rejected)} messages", expected)
    for number, (one, other) in enumerate(zip(chosen[:-1], rejected[:-1], strict=True)):
        if one != other:
            expected = f"that of `chosen`, {one}"
            raise InputError(f"{label}: rejected[{number}]", other, expected)
