"""Chats as documents, of which the assistant's answers alone are trained."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxscale.data.files import find_files, read_lines, stamps
from jaxscale.data.sources import ChatDocument
from jaxscale.data.tokenizer_kinds import HUGGING_FACE_FILE
from jaxscale.types import InputError, check_types

if TYPE_CHECKING:
    from jaxscale.data.chat_template import ChatTemplate, Message

ASSISTANT = "assistant"
NEXT = {"role": "user", "content": "Go on."}


@dataclasses.dataclass(frozen=True)
class ChatSource:
    """One chat per line of JSON, gzip and zstd recognised by their first bytes; extra `chat`.

    Its text is that of the tokenizer's template; what the assistant says, with what ends it, is
    trained and the rest is only read.

    Args:
        paths: files and folders.
        tokenizer: folder of Hugging Face with the tokenizer of the run and its chat template.
        patterns: which files of a folder count.
        field: the field that holds the messages, each with a `role` and its `content`.
    """

    paths: tuple[str, ...]
    tokenizer: str
    patterns: tuple[str, ...] = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
    field: str = "messages"

    def __post_init__(self):
        check_types(self)

    def documents(self) -> Iterator[ChatDocument]:
        """The chats, in the order of their lines."""
        # It needs jinja, which runs without chats do without.
        from jaxscale.data.chat_template import read_chat_template

        folder = Path(self.tokenizer).expanduser()
        template = read_chat_template(folder)
        if template is None:
            raise InputError(
                "ChatSource.tokenizer", self.tokenizer, "a folder with a chat template"
            )
        special = _special_tokens(folder / HUGGING_FACE_FILE)
        for name, path in self._files():
            lines = read_lines("ChatSource.paths", path)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    messages = _messages(line, f"{path}:{number}", self.field, special)
                    yield chat_document(template, messages, f"{name}:{number}")

    def version(self) -> list[Any]:
        """Facts of the files, and of the template."""
        folder = Path(self.tokenizer).expanduser()
        names = ("chat_template.jinja", "tokenizer_config.json", HUGGING_FACE_FILE)
        files = [folder / name for name in names if (folder / name).exists()]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        return [*stamps(self._files()), *hashes]

    def _files(self) -> list[tuple[str, Path]]:
        return find_files("ChatSource.paths", self.paths, self.patterns)


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
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = template.render(messages[:index], is_reply_next=True)
        # What stands after the answer whether the chat goes on or not is the answer's too.
        so_far = messages[: index + 1]
        last = template.render(so_far, is_reply_next=False)
        going_on = template.render([*so_far, NEXT], is_reply_next=False)
        end = min(_common_length(last, other) for other in (text, going_on))
        if not text.startswith(before) or end <= len(before):
            expected = "a chat whose answers follow what is written of the messages before them"
            raise InputError(key, text, expected)
        spans.append((len(before), end))
    if not spans:
        raise InputError(key, messages, "at least one message of the assistant")
    return ChatDocument(key, text, tuple(spans))


def _common_length(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = enumerate(zip(one, other))
    shorter = min(len(one), len(other))
    return next((place for place, (a, b) in pairs if a != b), shorter)


def _messages(
    line: bytes,
    label: str,
    field: str,
    special: list[str],
) -> "list[Message]":
    try:
        messages = json.loads(line)[field]
        pairs = [(message["role"], message["content"]) for message in messages]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        beginning = line[:80].decode(errors="replace")
        expected = f"a JSON object with {field!r}, a list of role and content ({error!r})"
        raise InputError(label, beginning, expected) from None
    for pair in pairs:
        if not all(isinstance(each, str) for each in pair):
            raise InputError(f"{label}: {field}", pair, "a role and a content of text")
        for token in special:
            if token in pair[1]:
                expected = f"text that does not spell the special token {token!r}"
                raise InputError(f"{label}: {field}", pair[1], expected)
    return [{"role": role, "content": content} for role, content in pairs]


def _special_tokens(file: Path) -> list[str]:
    """The special tokens of a tokenizer.json."""
    try:
        added = json.loads(file.read_text()).get("added_tokens", [])
        return [token["content"] for token in added if token["special"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(str(file), None, f"a tokenizer.json ({error})") from None
