"""An HTTP server that OpenAI's clients know, on FastAPI; needs the extra `serve`."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from jaxscale.data.chat_template import ChatTemplate
from jaxscale.serve.decoding import check_prompts
from jaxscale.serve.engine import Engine
from jaxscale.serve.metrics import Metrics, SequenceClock
from jaxscale.serve.openai import (
    ChatRequest,
    CompletionRequest,
    Form,
    GenerationRequest,
    Usage,
    error_json,
)
from jaxscale.serve.requests import Completion, Delta, RequestConfig
from jaxscale.serve.sampling import MAX_SEED
from jaxscale.serve.worker import Answers, Frontend
from jaxscale.types import InputError, RunError

METRICS_TYPE = "text/plain; version=0.0.4"
DISCONNECT_POLL_S = 0.1
CLIENT_CLOSED = 499  # nobody sees it; nginx's number for a client that has gone
OPEN_PATHS = ("/health", "/metrics")  # for a balancer and a monitor, which have no key


@dataclasses.dataclass(frozen=True)
class Service:
    """What is served.

    Args:
        model: the name under which clients ask for it.
        chat_template: of the tokenizer; None refuses chats.
        api_keys: of which a client must send one; empty for none.
        timeout_s: after which a request is ended; None for never.
    """

    model: str
    chat_template: ChatTemplate | None = None
    api_keys: tuple[str, ...] = ()
    timeout_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as the engine takes it.

    Args:
        prompts: tokens of each prompt.
        config: how each is continued.
        form: of the answer.
    """

    prompts: list[list[int]]
    config: RequestConfig
    form: Form

    @property
    def num_choices(self) -> int:
        """Continuations of all prompts."""
        return len(self.prompts) * self.config.num_sequences

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
        self._grammars = engine.grammars
        self._frontend = Frontend(engine)

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine, if anything did."""
        return self._frontend.failure

    async def figures(self) -> str:
        """The metrics in Prometheus' text format."""
        return self.metrics.text(await self._frontend.call(lambda engine: engine.figures()))

    def completion(self, body: CompletionRequest) -> Asked:
        """What a completion asks of the engine.

        Raises:
            InputError: something in it is wrong.
        """
        self._check_model(body)
        prompts = [
            self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts()
        ]
        return self._asked(body, prompts, body.max_tokens or 16, body.logprobs)

    def chat(self, body: ChatRequest) -> Asked:
        """What a chat asks of the engine; Raises as `completion`."""
        self._check_model(body)
        if self.service.chat_template is None:
            raise InputError("messages", "a chat", "a model whose tokenizer has a chat template")
        messages = [message.plain() for message in body.messages]
        tools = None if body.tool_choice == "none" else body.tools
        prompt = self.service.chat_template.encode(messages, self._tokenizer, tools=tools)
        room = max(self._model.max_length - len(prompt), 1)
        wanted = body.max_completion_tokens or body.max_tokens or room
        return self._asked(body, [prompt], wanted, body.num_logprobs(), is_chat=True)

    def _asked(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        max_new_tokens: int,
        num_logprobs: int | None,
        *,
        is_chat: bool = False,
    ) -> Asked:
        check_prompts(prompts, self._model, max_new_tokens)
        config = body.config(
            max_new_tokens=max_new_tokens,
            num_logprobs=num_logprobs,
            random_seed=secrets.randbelow(MAX_SEED + 1),
            timeout_s=self.service.timeout_s,
        )
        return Asked(prompts, config, Form(self.service.model, is_chat, self._tokenizer))

    def _check_model(self, body: GenerationRequest) -> None:
        if body.model != self.service.model:
            raise InputError("model", body.model, f"{self.service.model!r}")

    async def submit(self, asked: Asked) -> Answers:
        """Has the engine continue what is asked; Raises as `Frontend.submit`."""
        if asked.config.grammar:
            # It may take a second, for which neither the loop nor the engine should wait.
            await asyncio.to_thread(self._grammars.begin, asked.config.grammar)
        return await self._frontend.submit(asked.prompts, asked.config)

    async def observed(self, answers: Answers) -> AsyncIterator[tuple[int, Delta]]:
        """`Answers.deltas`, of which the metrics take note."""
        clocks = [SequenceClock() for _ in range(answers.num_choices)]
        try:
            async with contextlib.aclosing(answers.deltas()) as deltas:
                async for choice, delta in deltas:
                    self.metrics.observe(clocks[choice], delta)
                    yield choice, delta
        finally:
            self.metrics.count_cancelled(answers.num_open)

    async def whole(self, asked: Asked, answers: Answers) -> dict[str, Any]:
        """The answer as a whole."""
        choices = [Completion() for _ in range(asked.num_choices)]
        async with contextlib.aclosing(self.observed(answers)) as deltas:
            async for choice, delta in deltas:
                choices[choice].add(delta)
        return asked.form.whole(choices, asked.usage(choices))

    async def events(
        self,
        asked: Asked,
        answers: Answers,
        has_usage: bool,
    ) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        form, choices = asked.form, [Completion() for _ in range(asked.num_choices)]
        for fields in form.first(asked.num_choices):
            yield _event(fields)
        try:
            async with contextlib.aclosing(self.observed(answers)) as deltas:
                async for choice, delta in deltas:
                    choices[choice].add(delta)
                    if fields := form.chunk(choice, delta):
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


def make_app(make_engine: Callable[[], Engine], service: Service) -> FastAPI:
    """The application; its engine is made when it starts, and ends with it.

    Args:
        make_engine: the engine, with a tokenizer.
        service: what is served.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.handler = Handler(make_engine(), service)
        try:
            yield
        finally:
            app.state.handler.close()

    # Without pages of documentation, which load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, title="jaxscale")
    _add_errors(app)
    _add_keys(app, service.api_keys)
    _add_models(app, service)
    _add_state(app)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        handler: Handler = app.state.handler
        return await _answer(handler, handler.completion(body), body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        handler: Handler = app.state.handler
        return await _answer(handler, handler.chat(body), body, request)

    return app


async def _answer(
    handler: Handler,
    asked: Asked,
    body: GenerationRequest,
    request: Request,
) -> Response:
    answers = await handler.submit(asked)
    if body.stream:
        options = body.stream_options
        events = handler.events(asked, answers, bool(options and options.include_usage))
        return StreamingResponse(events, media_type="text/event-stream")
    answering = asyncio.ensure_future(handler.whole(asked, answers))
    try:
        while not answering.done():
            await asyncio.wait([answering], timeout=DISCONNECT_POLL_S)
            if not answering.done() and await request.is_disconnected():
                return Response(status_code=CLIENT_CLOSED)
        return JSONResponse(answering.result())
    finally:
        answering.cancel()


def _add_models(app: FastAPI, service: Service) -> None:
    card = {"id": service.model, "object": "model", "created": 0, "owned_by": "jaxscale"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model:
            raise InputError("model", name, f"{service.model!r}")
        return card


def _add_state(app: FastAPI) -> None:
    @app.get("/health")
    async def health() -> Response:
        failure = app.state.handler.failure
        if failure is not None:
            return _error(503, f"the engine failed: {failure}")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await app.state.handler.figures()
        return PlainTextResponse(text, media_type=METRICS_TYPE)


def _add_keys(app: FastAPI, api_keys: tuple[str, ...]) -> None:
    """Asks for a key, where there are keys."""
    if not api_keys:
        return
    keys = [key.encode() for key in api_keys]

    @app.middleware("http")
    async def check_key(request: Request, call_next: Callable) -> Response:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_known = [hmac.compare_digest(given.encode(), key) for key in keys]  # all of them
        if request.url.path not in OPEN_PATHS and not (scheme == "Bearer" and any(is_known)):
            return _error(401, "the API key is missing or wrong", code="invalid_api_key")
        return await call_next(request)


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(InputError)
    async def input_error(_: Request, error: InputError) -> Response:
        if error.parameter == "model":
            return _error(404, str(error), param="model", code="model_not_found")
        code = "context_length_exceeded" if "model.max_length" in str(error) else None
        # Of "SamplingConfig.top_p" and "prompts[0]" what a client knows.
        field = error.parameter.rsplit(".", 1)[-1]
        param = "prompt" if field.startswith("prompts[") else field
        return _error(400, str(error), param=param, code=code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # The kinds of a union, such as of a prompt, are in the place too; the field comes first.
        place = [str(part) for part in first["loc"] if part != "body"]
        parameter = place[0] if place and first["type"] != "json_invalid" else None
        message = f"{'.'.join(place)}: {first['msg']}" if parameter else first["msg"]
        return _error(400, message, param=parameter)

    @app.exception_handler(RunError)
    async def failed(_: Request, error: RunError) -> Response:
        return _error(503, str(error))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))


def _error(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
) -> Response:
    fields = error_json(message, status=status, param=param, code=code)
    return JSONResponse(fields, status_code=status)


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
