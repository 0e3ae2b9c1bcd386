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
class Form:
    """Answers in the form of one kind of request.

    Args:
        model: its name.
        is_chat: whether chat completions or completions.
        tokenizer: spells tokens.
        id: of the answer.
        created_s: Unix time.
    """

    model: str
    is_chat: bool
    tokenizer: Tokenizer
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created_s: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Completion], usage: Usage) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        versions = {choice.weights_version for choice in choices}
        found = [self._choice(index, choice) for index, choice in enumerate(choices)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        fields = self._head(kind, found) | {"usage": usage.json()}
        return fields | {"weights_version": max(versions)}

    def first(self, num_choices: int) -> list[dict[str, Any]]:
        """What a stream begins with: in a chat, the role of each choice."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None) for index in range(num_choices)]

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """What is new of a choice; None where nothing can be said yet."""
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        text = {"delta": {"content": delta.text}} if self.is_chat else {"text": delta.text}
        text["logprobs"] = self._logprobs(delta.tokens, delta.logprobs)
        fields = self._chunk(index, text, delta.finish_reason)
        return fields | {"weights_version": delta.weights_version}

    def last(self, usage: Usage) -> dict[str, Any]:
        """What a stream ends with where its usage is asked for."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._head(kind, []) | {"usage": usage.json()}

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, index: int, choice: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text}
        return {
            "index": index,
            **({"message": message} if self.is_chat else {"text": choice.text}),
            "logprobs": self._logprobs(choice.tokens, choice.logprobs),
            "finish_reason": REASONS[choice.finish_reason],
        }

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        reason: FinishReason | None,
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        finish_reason = None if reason is None else REASONS[reason]
        choice = {"index": index, **content, "finish_reason": finish_reason}
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
        tops = [
            {self.tokenizer.decode([token]): value for token, value in each.top}
            for each in logprobs
        ]
        return {
            "tokens": [self.tokenizer.decode([token]) for token in tokens],
            "token_logprobs": [each.drawn for each in logprobs],
            "top_logprobs": tops,
        }

    def _in_chat(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        top = [self._spelt(token, value) for token, value in logprobs.top]
        return self._spelt(token, logprobs.drawn) | {"top_logprobs": top}

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


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
