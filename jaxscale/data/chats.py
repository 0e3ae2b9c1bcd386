"""Chats as documents, of which the assistant's answers alone are trained."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxscale.data.files import find_files, read_lines, stamps
from jaxscale.data.sources import ChatDocument
from jaxscale.data.tokenizer_kinds import HUGGING_FACE_FILE
from jaxscale.types import InputError, check_types

if TYPE_CHECKING:
    from jaxscale.data.chat_template import ChatTemplate, Message

ASSISTANT = "assistant"
NEXT = {"role": "user", "content": "Go on."}


class Line(NamedTuple):
    """A line of a file.

    Args:
        text: the line.
        label: names it in errors.
        key: names it among the documents.
        special: the special tokens, which no message may spell.
    """

    text: bytes
    label: str
    key: str
    special: list[str]

    def field(self, name: str, kind: str) -> Any:
        """A field of the JSON object that the line is; `kind` says in an error what it holds."""
        try:
            return json.loads(self.text)[name]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            beginning = self.text[:80].decode(errors="replace")
            expected = f"a JSON object with {name!r}, {kind} ({error!r})"
            raise InputError(self.label, beginning, expected) from None

    def messages(self, name: str) -> "list[Message]":
        """A field that holds messages."""
        found = self.field(name, "a list of role and content")
        label = f"{self.label}: {name}"
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise InputError(label, found, "a list of messages, each with a role and its content")
        return [checked(message, label, self.special) for message in found]


def checked(message: dict[str, Any], label: str, special: Iterable[str]) -> "Message":
    """A message of a chat; raises InputError unless it is of text that spells no special token."""
    role, content = message.get("role"), message.get("content")
    if not (isinstance(role, str) and isinstance(content, str)):
        raise InputError(label, (role, content), "a role and a content of text")
    for token in special:
        if token in content:
            expected = f"text that does not spell the special token {token!r}"
            raise InputError(label, content, expected)
    return {"role": role, "content": content}


@dataclasses.dataclass(frozen=True)
class TemplatedSource:
    """Lines of JSON whose messages the tokenizer's chat template writes; see its subclasses.

    Args:
        paths: files and folders.
        tokenizer: folder of Hugging Face with the tokenizer of the run and its chat template.
        patterns: which files of a folder count.
    """

    paths: tuple[str, ...]
    tokenizer: str
    patterns: tuple[str, ...] = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst")

    def __post_init__(self):
        check_types(self)

    def documents(self) -> Iterator[ChatDocument]:
        """The documents, in the order of their lines."""
        template = self._template()
        for line in self._lines():
            yield self._document(line, template)

    def _template(self) -> "ChatTemplate":
        # It needs jinja, which runs without chats do without.
        from jaxscale.data.chat_template import read_chat_template

        return read_chat_template(Path(self.tokenizer).expanduser())

    def _lines(self) -> Iterator[Line]:
        kind = type(self).__name__
        special = _special_tokens(Path(self.tokenizer).expanduser() / HUGGING_FACE_FILE)
        for name, path in self._files():
            for number, line in enumerate(read_lines(f"{kind}.paths", path), 1):
                if line.strip():
                    yield Line(line, f"{path}:{number}", f"{name}:{number}", special)

    def _document(self, line: Line, template: "ChatTemplate") -> ChatDocument:
        raise NotImplementedError

    def version(self) -> list[Any]:
        """Facts of the files, and of the template."""
        folder = Path(self.tokenizer).expanduser()
        names = ("chat_template.jinja", "tokenizer_config.json", HUGGING_FACE_FILE)
        files = [folder / name for name in names if (folder / name).exists()]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        return [*stamps(self._files()), *hashes]

    def _files(self) -> list[tuple[str, Path]]:
        return find_files(f"{type(self).__name__}.paths", self.paths, self.patterns)


@dataclasses.dataclass(frozen=True)
class ChatSource(TemplatedSource):
    """One chat per line of JSON, gzip and zstd recognised by their first bytes; extra `chat`.

    Its text is that of the tokenizer's template; what the assistant says, with what ends it, is
    trained and the rest is only read.

    Args:
        paths: files and folders.
        tokenizer: folder of Hugging Face with the tokenizer of the run and its chat template.
        patterns: which files of a folder count.
        field: the field that holds the messages, each with a `role` and its `content`.
    """

    field: str = "messages"

    def _document(self, line: Line, template: "ChatTemplate") -> ChatDocument:
        return chat_document(template, line.messages(self.field), line.key)


def chat_document(
    template: "ChatTemplate",
    messages: "list[Message]",
    key: str,
) -> ChatDocument:
    """The text of a chat, with the spans of what the assistant says.

    Args:
        template: of the tokenizer.
        messages: of the chat.
        key: of the document.
    Raises:
        InputError: there is no answer, or the template writes the beginning of a chat otherwise
            once it goes on, so that no span is an answer's.
    """
    text = template.render(messages, is_reply_next=False)
    places = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not places:
        raise InputError(key, messages, "at least one message of the assistant")
    spans = tuple(answer_span(template, messages, place, text, key) for place in places)
    return ChatDocument(key, text, spans)


def answer_span(
    template: "ChatTemplate",
    messages: "list[Message]",
    index: int,
    text: str,
    key: str,
) -> tuple[int, int]:
    """First and last character of an answer in the text of a chat, with what ends the answer.

    Args:
        template: of the tokenizer.
        messages: of the chat.
        index: of the answer.
        text: of the chat, by the template.
        key: of the document, for errors.
    Raises:
        InputError: as `chat_document`.
    """
    before = template.render(messages[:index], is_reply_next=True)
    # What stands after the answer whether the chat goes on or not is the answer's too.
    so_far = messages[: index + 1]
    last = template.render(so_far, is_reply_next=False)
    going_on = template.render([*so_far, NEXT], is_reply_next=False)
    end = min(_common_length(last, other) for other in (text, going_on))
    if not text.startswith(before) or end <= len(before):
        expected = "a chat whose answers follow what is written of the messages before them"
        raise InputError(key, text, expected)
    return len(before), end


def _common_length(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = enumerate(zip(one, other))
    shorter = min(len(one), len(other))
    return next((place for place, (a, b) in pairs if a != b), shorter)


def _special_tokens(file: Path) -> list[str]:
    """The special tokens of a tokenizer.json."""
    try:
        added = json.loads(file.read_text()).get("added_tokens", [])
        return [token["content"] for token in added if token["special"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(str(file), None, f"a tokenizer.json ({error})") from None
