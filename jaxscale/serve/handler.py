"""Requests in OpenAI's form, answered by an engine; the server is around it."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from jaxscale.data.chat_template import ChatTemplate
from jaxscale.serve.answers import Form, Usage, error_json
from jaxscale.serve.decoding import check_prompts
from jaxscale.serve.engine import Engine
from jaxscale.serve.metrics import Metrics, SequenceClock
from jaxscale.serve.openai import ChatRequest, CompletionRequest, GenerationRequest
from jaxscale.serve.requests import Completion, Delta, RequestConfig
from jaxscale.serve.sampling import MAX_SEED
from jaxscale.serve.tools import BARE, find_form
from jaxscale.serve.worker import Answers, Frontend
from jaxscale.types import InputError, Params, RunError


@dataclasses.dataclass(frozen=True)
class Service:
    """What is served.

    Args:
        model: the name under which clients ask for it.
        chat_template: of the tokenizer; None refuses chats.
        api_keys: of which a client must send one; empty for none.
        stop_ids: tokens that end an answer, beside the tokenizer's end token.
        timeout_s: after which a request is ended; None for never.
        read_params: (step or None for the newest) -> the parameters of that checkpoint, for clients
            that steer the engine; None lets nobody steer it.
    """

    model: str
    chat_template: ChatTemplate | None = None
    api_keys: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    timeout_s: float | None = None
    read_params: Callable[[int | None], Params] | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as the engine takes it.

    Args:
        prompts: tokens of each prompt.
        config: how each is continued.
        form: of the answer.
        seeds: of each prompt.
    """

    prompts: list[list[int]]
    config: RequestConfig
    form: Form
    seeds: list[int]

    @property
    def num_choices(self) -> int:
        """Continuations of all prompts."""
        return len(self.prompts) * self.config.num_sequences

    def configs(self) -> list[RequestConfig]:
        """How each prompt is continued."""
        sampling = self.config.sampling
        return [
            dataclasses.replace(self.config, sampling=dataclasses.replace(sampling, seed=seed))
            for seed in self.seeds
        ]

    def of_choices(self) -> list[list[int]]:
        """The prompt of each choice."""
        return [prompt for prompt in self.prompts for _ in range(self.config.num_sequences)]

    def usage(self, choices: list[Completion]) -> Usage:
        """The tokens of the request; a prompt counts once for all of its choices."""
        firsts = choices[:: self.config.num_sequences]
        return Usage(
            prompt=sum(map(len, self.prompts)),
            cached=sum(choice.num_cached for choice in firsts),
            new=sum(len(choice.tokens) for choice in choices),
        )


class Handler:
    """Answers requests with an engine.

    Args:
        engine: the server's alone.
        service: what is served.
    """

    def __init__(self, engine: Engine, service: Service):
        self.service = service
        self.metrics = Metrics(service.model)
        self._model, self._tokenizer = engine.model, engine.tokenizer
        self._max_length = engine.max_length
        self.adapters = tuple(engine.adapters)
        self._grammars = engine.grammars
        self._frontend = Frontend(engine)

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine, if anything did."""
        return self._frontend.failure

    async def pause(self) -> None:
        """Gives the cache's memory back; requests wait until `resume`."""
        await self._frontend.steer(lambda engine: engine.pause())

    async def resume(self) -> None:
        """Goes on after `pause`."""
        await self._frontend.call(lambda engine: engine.resume())

    async def swap(self, step: int | None) -> int:
        """Has the engine take a checkpoint's weights; returns their version.

        Raises:
            InputError: there is no such checkpoint.
        """
        params = await asyncio.to_thread(self.service.read_params, step)
        await self._frontend.steer(lambda engine: engine.swap(params))
        return await self._frontend.call(lambda engine: engine.figures().weights_version)

    async def figures(self) -> str:
        """The metrics in Prometheus' text format."""
        return self.metrics.text(await self._frontend.call(lambda engine: engine.figures()))

    def completion(self, body: CompletionRequest) -> Asked:
        """What a completion asks of the engine.

        Raises:
            InputError: something in it is wrong.
        """
        is_begun = body.add_special_tokens is not False
        encode = self._tokenizer.encode if is_begun else self._tokenizer.encode_part
        prompts = [
            encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts()
        ]
        asked = self._asked(body, prompts, body.max_tokens or 16, body.logprobs)
        form = dataclasses.replace(asked.form, is_echo=bool(body.echo))
        return dataclasses.replace(asked, form=form)

    def chat(self, body: ChatRequest) -> Asked:
        """What a chat asks of the engine; Raises as `completion`."""
        if self.service.chat_template is None:
            raise InputError("messages", "a chat", "a model whose tokenizer has a chat template")
        messages = [message.plain() for message in body.messages]
        tools = None if body.tool_choice == "none" else body.tools
        prompt = self._encode(messages, tools)
        if body.add_special_tokens:
            prompt = self._tokenizer.encode("") + prompt
        room = max(self._max_length - len(prompt), 1)
        wanted = body.max_completion_tokens or body.max_tokens or room
        asked = self._asked(body, [prompt], wanted, body.num_logprobs(), is_chat=True)
        return self._with_tools(asked, body, has_tools=bool(tools))

    def _with_tools(
        self,
        asked: Asked,
        body: ChatRequest,
        *,
        has_tools: bool,
    ) -> Asked:
        """What is asked, where the answer may call tools.

        Raises:
            InputError: as `ChatRequest.tool_grammar`, or the template tells the model of no tools.
        """
        grammar, config = body.tool_grammar(), asked.config
        if not has_tools:
            return asked
        source = self.service.chat_template.source
        if not grammar and "tools" not in source:
            names = [tool.get("function") for tool in body.tools]
            raise InputError("tools", names, "a model whose chat template has tools")
        form = BARE if grammar else find_form(source)
        if form is not None:
            spelt = tuple(marker for marker in (form.begin, form.end) if marker)
            config = dataclasses.replace(config, grammar=grammar or config.grammar, spelt=spelt)
        is_parallel = body.parallel_tool_calls is not False
        form = dataclasses.replace(asked.form, tools=form, is_parallel=is_parallel)
        return dataclasses.replace(asked, config=config, form=form)

    def _encode(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
    ) -> list[int]:
        """The tokens of a chat, up to where the assistant answers.

        Raises:
            InputError: the template refuses the chat.
        """
        try:
            return self.service.chat_template.encode(messages, self._tokenizer, tools=tools)
        except InputError as error:  # which names the template's file, no business of a client
            roles = [message["role"] for message in messages]
            expected = "a chat that the model's template takes"
            raise InputError("messages", roles, expected) from error

    def _asked(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        max_new_tokens: int,
        num_logprobs: int | None,
        *,
        is_chat: bool = False,
    ) -> Asked:
        adapter = self._adapter(body)
        check_prompts(prompts, self._model, max_new_tokens)
        # Prompts without a seed draw apart, equal ones too; a seed draws the same for each prompt
        # in whatever request it is.
        seeds = [_seed(body) for _ in prompts]
        config = body.config(
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            num_logprobs=num_logprobs,
            seed=seeds[0],
            timeout_s=self.service.timeout_s,
        )
        if not config.ignore_eos:
            stop_ids = (*config.stop_ids, *self.service.stop_ids)
            config = dataclasses.replace(config, stop_ids=stop_ids)
        return Asked(prompts, config, Form(body.model, is_chat, self._tokenizer), seeds)

    def _adapter(self, body: GenerationRequest) -> str | None:
        """The adapter that is asked for by its name as a model; None for the model itself.

        Raises:
            InputError: there is no such model.
        """
        if body.model in self.adapters:
            return body.model
        if body.model != self.service.model:
            expected = " or ".join(map(repr, (self.service.model, *self.adapters)))
            raise InputError("model", body.model, expected)
        return None

    async def submit(self, asked: Asked) -> Answers:
        """Has the engine continue what is asked; Raises as `Frontend.submit`."""
        if asked.config.grammar:
            # It may take a second, for which neither the loop nor the engine should wait.
            await asyncio.to_thread(self._grammars.begin, asked.config.grammar)
        return await self._frontend.submit(asked.prompts, asked.configs())

    def drop(self, answers: Answers) -> None:
        """Ends what of an answer is not finished: nobody listens any more."""
        self.metrics.count_cancelled(answers.num_open)
        answers.close()

    async def observed(
        self,
        asked: Asked,
        answers: Answers,
    ) -> AsyncIterator[tuple[int, Delta]]:
        """`Answers.deltas`, of which the metrics take note."""
        clocks = [SequenceClock(len(prompt)) for prompt in asked.of_choices()]
        async with contextlib.aclosing(answers.deltas()) as deltas:
            async for choice, delta in deltas:
                self.metrics.observe(clocks[choice], delta)
                yield choice, delta
        num = asked.config.num_sequences
        for first in range(0, len(clocks), num):
            self.metrics.observe_longest(clocks[first : first + num])

    async def whole(self, asked: Asked, answers: Answers) -> dict[str, Any]:
        """The answer as a whole."""
        choices = [Completion() for _ in range(asked.num_choices)]
        async with contextlib.aclosing(self.observed(asked, answers)) as deltas:
            async for choice, delta in deltas:
                choices[choice].add(delta)
        for number, choice in enumerate(choices):  # the first of a prompt has its scores
            first = number - number % asked.config.num_sequences
            choice.prompt_logprobs = choices[first].prompt_logprobs
        return asked.form.whole(choices, asked.of_choices(), asked.usage(choices))

    async def events(
        self,
        asked: Asked,
        answers: Answers,
        has_usage: bool,
    ) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        form, choices = asked.form, [Completion() for _ in range(asked.num_choices)]
        listeners = form.listeners(asked.num_choices)
        for fields in form.first(asked.num_choices):
            yield _event(fields)
        try:
            async with contextlib.aclosing(self.observed(asked, answers)) as deltas:
                async for choice, delta in deltas:
                    choices[choice].add(delta)
                    if fields := form.chunk(choice, delta, listeners[choice]):
                        yield _event(fields)
        except RunError as error:
            yield _event(error_json(str(error), status=500))
            return
        if has_usage:
            yield _event(form.last(asked.usage(choices)))
        yield "data: [DONE]\n\n"

    def close(self) -> None:
        """Ends the engine's thread."""
        self._frontend.close()


def _seed(body: GenerationRequest) -> int:
    """What the client gives, or one at random."""
    return secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed % (MAX_SEED + 1)


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
