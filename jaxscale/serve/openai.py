"""OpenAI's requests and answers, and what they are to the engine.

Source: OpenAI's API reference, completions and chat completions; the fields that it lacks have the
names of vLLM's server.
"""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxscale.data.tokenizer import Tokenizer
from jaxscale.serve.grammar import GrammarConfig, choice_grammar, json_grammar
from jaxscale.serve.requests import Completion, Delta, Penalties, RequestConfig, TokenLogprobs
from jaxscale.serve.sampling import MAX_SEED, SamplingConfig
from jaxscale.serve.sequences import FinishReason
from jaxscale.types import InputError

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_STOPS = 16
REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.TIMEOUT: "timeout",
}


class StreamOptions(BaseModel):
    """What a stream holds besides its text."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema with its name."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's more general form of it; one of its fields."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GenerationRequest(BaseModel):
    """What both kinds of requests have; unknown fields are ignored, as OpenAI's clients expect."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    priority: int | None = 0
    structured_outputs: StructuredOutputs | None = None
    # Named, so that they are refused and not ignored.
    logit_bias: dict[str, float] | None = None

    def config(
        self,
        *,
        max_new_tokens: int,
        num_logprobs: int | None,
        random_seed: int,
        timeout_s: float | None,
    ) -> RequestConfig:
        """What the engine is asked.

        Raises:
            InputError: a value is out of range, under OpenAI's name for it.
        """
        if self.logit_bias:
            raise InputError("logit_bias", self.logit_bias, "none: it is not supported")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOPS:
            raise InputError("stop", f"{len(stop)} texts", f"at most {MAX_STOPS}")
        seed = random_seed if self.seed is None else self.seed % (MAX_SEED + 1)
        top_k = self.top_k if self.top_k and self.top_k > 0 else None
        sampling = SamplingConfig(
            temperature=float(_or(self.temperature, 1.0)),
            top_k=top_k,
            top_p=float(_or(self.top_p, 1.0)),
            min_p=float(_or(self.min_p, 0.0)),
            seed=seed,
        )
        penalties = Penalties(
            repetition=float(_or(self.repetition_penalty, 1.0)),
            presence=float(_or(self.presence_penalty, 0.0)),
            frequency=float(_or(self.frequency_penalty, 0.0)),
        )
        return RequestConfig(
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            num_sequences=_or(self.n, 1),
            stop=stop,
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            penalties=penalties,
            num_logprobs=num_logprobs,
            grammar=self.grammar(),
            priority=_or(self.priority, 0),
            timeout_s=timeout_s,
        )

    def grammar(self) -> GrammarConfig | None:
        """The grammar of the answer.

        Raises:
            InputError: a schema is missing, or several grammars are given.
        """
        asked, found = self.response_format, []
        if asked and asked.type == "json_object":
            found.append(json_grammar({"type": "object"}))
        if asked and asked.type == "json_schema":
            if asked.json_schema is None:
                raise InputError("response_format", "json_schema", "a schema with it")
            found.append(json_grammar(asked.json_schema.schema_))
        if more := self.structured_outputs:
            if more.json_ is not None:
                schema = more.json_
                is_text = isinstance(schema, str)
                found.append(
                    GrammarConfig("json_schema", schema) if is_text else json_grammar(schema)
                )
            if more.regex is not None:
                found.append(GrammarConfig("regex", more.regex))
            if more.choice is not None:
                found.append(choice_grammar(more.choice))
            if more.grammar is not None:
                found.append(GrammarConfig("lark", more.grammar))
        if len(found) > 1:
            raise InputError("structured_outputs", f"{len(found)} grammars", "one at most")
        return found[0] if found else None


class CompletionRequest(GenerationRequest):
    """Of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several, each a text or tokens.

        Raises:
            InputError: there is none, too many, or what is asked is not supported.
        """
        if self.best_of not in (None, self.n):
            raise InputError("best_of", self.best_of, f"n = {self.n}, or nothing")
        if self.echo:
            raise InputError("echo", True, "false: it is not supported")
        if self.suffix:
            raise InputError("suffix", self.suffix, "none: it is not supported")
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not 1 <= len(prompt) <= MAX_PROMPTS:
            raise InputError("prompt", f"{len(prompt)} prompts", f"1 to {MAX_PROMPTS}")
        return prompt


class FunctionCall(BaseModel):
    """A call that an assistant made before."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A tool call that an assistant made before."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        fields = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            fields["content"] = "".join(part.text for part in self.content)
        return {"content": ""} | fields


class ChatRequest(GenerationRequest):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    def num_logprobs(self) -> int | None:
        """How many log-probabilities are asked for.

        Raises:
            InputError: top_logprobs without logprobs.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs", self.top_logprobs, "logprobs=true with it")
        return _or(self.top_logprobs, 0) if self.logprobs else None


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


def _or(value: Any, default: Any) -> Any:
    """A field that is null is as one that is not given."""
    return default if value is None else value
