"""OpenAI's requests, and what they are to the engine.

Source: OpenAI's API reference, completions and chat completions; the fields that it lacks have the
names of vLLM's server.
"""

import contextlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxscale.serve.grammar import GrammarConfig, choice_grammar, json_grammar
from jaxscale.serve.requests import (
    MAX_LOGPROBS,
    MAX_REPETITION,
    MIN_REPETITION,
    Penalties,
    RequestConfig,
)
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.serve.tools import chosen_name, forced_grammar
from jaxscale.types import InputError

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_STOPS = 16
MAX_STOP_IDS = 1024  # each new token is compared with all of them
# Fields of OpenAI's API and of vLLM's server that would change the answer and are not supported,
# with what they may hold all the same, beside null: what changes nothing.
UNSUPPORTED: dict[str, tuple] = {
    "logit_bias": ({},),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "reasoning_effort": ("none",),
    "modalities": (["text"],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "cache_salt": (),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "web_search_options": (),
    "verbosity": ("medium",),
    "audio": (),
    # Older names of what `structured_outputs` holds.
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(ge=MIN_REPETITION, le=MAX_REPETITION)]


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

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GenerationRequest(BaseModel):
    """What both kinds of requests have.

    Other fields are ignored, as OpenAI's clients expect, but for those in UNSUPPORTED.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: float | None = 0.0
    repetition_penalty: Repetition | None = 1.0
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = False
    priority: int | None = 0
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def config(
        self,
        *,
        max_new_tokens: int,
        num_logprobs: int | None,
        seed: int,
        timeout_s: float | None,
        adapter: str | None = None,
    ) -> RequestConfig:
        """What the engine is asked.

        Raises:
            InputError: a value is out of range, under OpenAI's name for it.
        """
        for name, given in (self.model_extra or {}).items():
            if given is not None and given not in UNSUPPORTED.get(name, (given,)):
                raise InputError(name, given, "none: it is not supported")
        if self.stream and self.prompt_logprobs is not None:
            raise InputError("prompt_logprobs", self.prompt_logprobs, "null in a stream")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOPS:
            raise InputError("stop", f"{len(stop)} texts", f"at most {MAX_STOPS}")
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
            num_prompt_logprobs=self.num_prompt_logprobs(),
            grammar=self.grammar(),
            adapter=adapter,
            priority=_or(self.priority, 0),
            timeout_s=timeout_s,
        )

    def num_prompt_logprobs(self) -> int | None:
        """How many log-probabilities of the prompt's tokens are asked for."""
        return self.prompt_logprobs

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
    add_special_tokens: bool | None = True  # vLLM's
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several, each a text or tokens.

        Raises:
            InputError: there is none, too many, or what is asked is not supported.
        """
        if self.best_of not in (None, self.n):
            raise InputError("best_of", self.best_of, f"n = {self.n}, or nothing")
        if self.echo and self.stream:
            raise InputError("echo", True, "false in a stream")
        if self.echo and self.prompt_logprobs is not None:
            expected = "null beside echo, whose logprobs are of the prompt too"
            raise InputError("prompt_logprobs", self.prompt_logprobs, expected)
        if self.suffix:
            raise InputError("suffix", self.suffix, "none: it is not supported")
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not 1 <= len(prompt) <= MAX_PROMPTS:
            raise InputError("prompt", f"{len(prompt)} prompts", f"1 to {MAX_PROMPTS}")
        return prompt

    def num_prompt_logprobs(self) -> int | None:
        """Those of an echo are as many as of new tokens."""
        return self.logprobs if self.echo else self.prompt_logprobs


class WeightsRequest(BaseModel):
    """Of /v1/weights: a checkpoint of the run, None for the newest."""

    step: Annotated[int, Field(ge=0)] | None = None


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
        for call in fields.get("tool_calls", ()):
            with contextlib.suppress(ValueError):  # templates write JSON; other text stays
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
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
    parallel_tool_calls: bool | None = True
    # vLLM's: templates write what begins a text.
    add_special_tokens: bool | None = False
    echo: Literal[False] | None = False

    def tool_grammar(self) -> GrammarConfig | None:
        """The grammar of an answer that has to be a call; None where it is free.

        Raises:
            InputError: there is no such tool, or another grammar is asked for too.
        """
        is_forced, name = chosen_name(self.tool_choice)
        if not is_forced:
            return None
        if not self.tools:
            raise InputError("tool_choice", self.tool_choice, "tools with it")
        if self.grammar() is not None:
            expected = '"auto" or "none" beside another grammar'
            raise InputError("tool_choice", self.tool_choice, expected)
        return forced_grammar(self.tools or [], name)

    def num_logprobs(self) -> int | None:
        """How many log-probabilities are asked for.

        Raises:
            InputError: top_logprobs without logprobs.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs", self.top_logprobs, "logprobs=true with it")
        return _or(self.top_logprobs, 0) if self.logprobs else None


def _or(value: Any, default: Any) -> Any:
    """A field that is null is as one that is not given."""
    return default if value is None else value
