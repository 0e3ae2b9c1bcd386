"""Answers in OpenAI's form.

Source: OpenAI's API reference, completions and chat completions.
"""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jaxscale.data.tokenizer import Tokenizer
from jaxscale.serve.requests import Completion, Delta, TokenLogprobs
from jaxscale.serve.sequences import FinishReason
from jaxscale.serve.text import UNFINISHED
from jaxscale.serve.tools import ToolCall, ToolForm, ToolStream

LEAST_LOGPROB = -9999.0  # OpenAI's for a token that is very unlikely
REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.TIMEOUT: "timeout",
}


@dataclasses.dataclass
class Usage:
    """Tokens of a request, added up over its prompts and choices."""

    prompt: int = 0
    cached: int = 0
    new: int = 0

    def json(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclasses.dataclass(frozen=True)
class Said:
    """What is new of a choice, or all of it.

    Args:
        text: that is no call of a tool.
        calls: of tools.
        num_before: calls that came before.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    num_before: int = 0


class Listener:
    """Reads the calls of tools out of a choice's text.

    Args:
        form: of the calls; None where no tool may be called.
        is_parallel: whether there may be several; else those behind the first are dropped.
    """

    def __init__(self, form: ToolForm | None, *, is_parallel: bool = True):
        self._stream = None if form is None else ToolStream(form)
        self._is_parallel = is_parallel

    def hear(self, text: str, *, is_last: bool) -> Said:
        """What is new."""
        if self._stream is None:
            return Said(text)
        num_before = self._stream.num_calls
        said, calls = self._stream.add(text)
        if is_last:
            more, others = self._stream.flush()
            said, calls = said + more, calls + others
        if not self._is_parallel:
            calls, num_before = calls[: 1 - min(num_before, 1)], min(num_before, 1)
        return Said(said, tuple(calls), num_before)


@dataclasses.dataclass(frozen=True)
class Form:
    """Answers in the form of one kind of request.

    Args:
        model: its name.
        is_chat: whether chat completions or completions.
        tokenizer: spells tokens.
        is_echo: whether a completion begins with its prompt.
        tools: the form of calls of tools; None where none may be called.
        is_parallel: whether an answer may call several tools.
        id: of the answer.
        created_s: Unix time.
    """

    model: str
    is_chat: bool
    tokenizer: Tokenizer
    is_echo: bool = False
    tools: ToolForm | None = None
    is_parallel: bool = True
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created_s: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(
        self,
        choices: Sequence[Completion],
        prompts: Sequence[Sequence[int]],
        usage: Usage,
    ) -> dict[str, Any]:
        """The answer to a request that is not streamed, with the prompt of each choice."""
        versions = {choice.weights_version for choice in choices}
        pairs = zip(choices, prompts, strict=True)
        found = [self._choice(index, *pair) for index, pair in enumerate(pairs)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        fields = self._head(kind, found) | {"usage": usage.json()}
        return fields | {"weights_version": max(versions)}

    def first(self, num_choices: int) -> list[dict[str, Any]]:
        """What a stream begins with: in a chat, the role of each choice."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None) for index in range(num_choices)]

    def listeners(self, num_choices: int) -> list[Listener]:
        """One for each choice of a stream."""
        return [self._listener() for _ in range(num_choices)]

    def chunk(self, index: int, delta: Delta, listener: Listener) -> dict[str, Any] | None:
        """What is new of a choice; None where nothing can be said yet."""
        said = listener.hear(delta.text, is_last=delta.finish_reason is not None)
        if not (said.text or said.calls or delta.logprobs or delta.finish_reason):
            return None
        text: dict[str, Any] = {"text": said.text}
        if self.is_chat:
            text = {"delta": {"content": said.text}}
            if said.calls:
                numbered = enumerate(said.calls, said.num_before)
                calls = [{"index": number} | call.json() for number, call in numbered]
                text["delta"]["tool_calls"] = calls
        text["logprobs"] = self._logprobs(delta.tokens, delta.logprobs)
        has_calls = bool(said.num_before or said.calls)
        fields = self._chunk(index, text, _reason(delta.finish_reason, has_calls))
        return fields | {"weights_version": delta.weights_version}

    def last(self, usage: Usage) -> dict[str, Any]:
        """What a stream ends with where its usage is asked for."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._head(kind, []) | {"usage": usage.json()}

    def _listener(self) -> Listener:
        return Listener(self.tools, is_parallel=self.is_parallel)

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }

    def _choice(
        self,
        index: int,
        choice: Completion,
        prompt: Sequence[int],
    ) -> dict[str, Any]:
        if self.is_echo:
            return self._echoed(index, choice, prompt)
        said = self._listener().hear(choice.text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": said.text}
        if said.calls:
            message["content"] = said.text or None
            message["tool_calls"] = [call.json() for call in said.calls]
        return {
            "index": index,
            **({"message": message} if self.is_chat else {"text": choice.text}),
            "logprobs": self._logprobs(choice.tokens, choice.logprobs),
            "finish_reason": _reason(choice.finish_reason, bool(said.calls)),
            **self._of_prompt(choice, prompt),
        }

    def _echoed(
        self,
        index: int,
        choice: Completion,
        prompt: Sequence[int],
    ) -> dict[str, Any]:
        """A completion behind its prompt; the prompt's first token has no log-probability."""
        tokens = [*prompt, *choice.tokens]
        logprobs = None
        rest = [*choice.prompt_logprobs, *choice.logprobs]
        if choice.logprobs and len(rest) == len(tokens) - 1:
            logprobs = self._logprobs(tokens[1:], rest)
            spelt = self.tokenizer.decode(tokens[:1])
            for name, first in (
                ("tokens", spelt),
                ("token_logprobs", None),
                ("top_logprobs", None),
            ):
                logprobs[name].insert(0, first)
        return {
            "index": index,
            "text": self.tokenizer.decode(prompt) + choice.text,
            "logprobs": logprobs,
            "finish_reason": _reason(choice.finish_reason, has_calls=False),
        }

    def _of_prompt(self, choice: Completion, prompt: Sequence[int]) -> dict[str, Any]:
        """vLLM's field for the log-probabilities of a prompt, where they are asked for."""
        if not choice.prompt_logprobs:
            return {}
        found: list[dict[str, Any] | None] = [None]
        for token, each in zip(prompt[1:], choice.prompt_logprobs, strict=True):
            known = {**dict(each.top), token: each.drawn}
            found.append(
                {
                    str(id): {"logprob": _in_json(value), "decoded_token": self._text(id)}
                    for id, value in known.items()
                }
            )
        return {"prompt_logprobs": found}

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        reason: str | None,
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        choice = {"index": index, **content, "finish_reason": reason}
        return self._head(kind, [choice])

    def _logprobs(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
    ) -> dict[str, Any] | None:
        if not logprobs:
            return None
        if self.is_chat:
            return {
                "content": [self._in_chat(*pair) for pair in zip(tokens, logprobs, strict=True)]
            }
        return {
            "tokens": [self._text(token) for token in tokens],
            "token_logprobs": [_in_json(each.drawn) for each in logprobs],
            "top_logprobs": [self._top(*pair) for pair in zip(tokens, logprobs, strict=True)],
        }

    def _top(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens and the one drawn, by their text.

        Several tokens may be parts of characters and have one text: the most probable one counts.
        """
        found: dict[str, float] = {}
        for each, value in (*logprobs.top, (token, logprobs.drawn)):
            found.setdefault(self._text(each), _in_json(value))
        return found

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _in_chat(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        top = [self._spelt(token, value) for token, value in logprobs.top]
        return self._spelt(token, logprobs.drawn) | {"top_logprobs": top}

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # A part of a character has no text of its own, and the bytes of its sign are not its own.
        spelt = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": _in_json(logprob), "bytes": spelt}


def _in_json(logprob: float) -> float:
    """A log-probability as JSON can have it, which knows no -inf of a forbidden token."""
    return max(logprob, LEAST_LOGPROB)


def _reason(reason: FinishReason | None, has_calls: bool) -> str | None:
    """In OpenAI's words."""
    if reason is FinishReason.STOP and has_calls:
        return "tool_calls"
    return None if reason is None else REASONS[reason]


def error_json(
    message: str,
    *,
    status: int,
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
