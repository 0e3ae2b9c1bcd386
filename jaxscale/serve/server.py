"""An HTTP server that OpenAI's clients know, on FastAPI; needs the extra `serve`."""

import asyncio
import contextlib
import functools
import hmac
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException

from jaxscale.serve.answers import error_json
from jaxscale.serve.engine import Engine
from jaxscale.serve.handler import Asked, Handler, Service
from jaxscale.serve.openai import ChatRequest, CompletionRequest, GenerationRequest, WeightsRequest
from jaxscale.types import InputError, RunError

METRICS_TYPE = "text/plain; version=0.0.4"
DISCONNECT_POLL_S = 0.1
CHATS = "/v1/chat/completions"
CLIENT_CLOSED = 499  # nobody sees it; nginx's number for a client that has gone
OPEN_PATHS = ("/", "/health", "/metrics")  # for browsers, balancers, monitors, without a key
OWN_SITES = (b"same-origin", b"none")  # values of Sec-Fetch-Site, a header that browsers set
CHAT_PAGE = Path(__file__).with_name("static") / "chat.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


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
    app.add_middleware(_SiteCheck)
    if service.api_keys:
        app.add_middleware(_KeyCheck, keys=service.api_keys)
    _add_models(app, service)
    _add_state(app)
    if service.read_params is not None:
        _add_steering(app)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        handler: Handler = app.state.handler
        return await _answer(handler, handler.completion(body), body, request)

    @app.post(CHATS)
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
        return _Stream(events, functools.partial(handler.drop, answers))
    answering = asyncio.ensure_future(handler.whole(asked, answers))
    try:
        while not answering.done():
            await asyncio.wait([answering], timeout=DISCONNECT_POLL_S)
            if not answering.done() and await request.is_disconnected():
                return Response(status_code=CLIENT_CLOSED)
        return JSONResponse(answering.result())
    finally:
        answering.cancel()
        handler.drop(answers)


class _Stream(StreamingResponse):
    """Server-sent events.

    Args:
        events: what is sent.
        end: called at the end, which may come before the first event if the client has gone.
    """

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def _add_models(app: FastAPI, service: Service) -> None:
    def cards() -> list[dict[str, Any]]:
        fields = {"object": "model", "created": 0, "owned_by": "jaxscale"}
        adapters = app.state.handler.adapters
        own = {"id": service.model, **fields}
        return [own, *({"id": name, **fields, "parent": service.model} for name in adapters)]

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": cards()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        found = [card for card in cards() if card["id"] == name]
        if not found:
            raise InputError("model", name, f"{service.model!r}")
        return found[0]


def _add_state(app: FastAPI) -> None:
    page = CHAT_PAGE.read_text()

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

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


def _add_steering(app: FastAPI) -> None:
    """What a training loop asks of an engine that draws its samples."""

    @app.post("/v1/pause")
    async def pause() -> dict[str, str]:
        await app.state.handler.pause()
        return {"status": "paused"}

    @app.post("/v1/resume")
    async def resume() -> dict[str, str]:
        await app.state.handler.resume()
        return {"status": "ok"}

    @app.post("/v1/weights")
    async def weights(body: WeightsRequest) -> dict[str, int]:
        return {"weights_version": await app.state.handler.swap(body.step)}


class _SiteCheck:
    """Refuses what a browser sends for a page of another site, which may reach loopback too.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] == "http" and scope["method"] != "GET":
            site = dict(scope["headers"]).get(b"sec-fetch-site", b"none")
            if site not in OWN_SITES:
                refusal = _error(403, "a page of another site may not ask for this")
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _KeyCheck:
    """Asks for a key before anything else is looked at.

    Args:
        app: what is behind it.
        keys: of which one has to be sent.
    """

    def __init__(self, app: Any, keys: tuple[str, ...]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS
        if not is_open and not self._knows(dict(scope["headers"]).get(b"authorization", b"")):
            refusal = _error(401, "the API key is missing or wrong", code="invalid_api_key")
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        is_equal = [hmac.compare_digest(given, key) for key in self._keys]  # all of them
        return scheme.lower() == b"bearer" and any(is_equal)


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(InputError)
    async def input_error(request: Request, error: InputError) -> Response:
        if error.parameter == "model":
            return _error(404, str(error), param="model", code="model_not_found")
        code = "context_length_exceeded" if "model.max_length" in str(error) else None
        # Of "SamplingConfig.top_p" and "prompts[0]" what a client knows.
        field = error.parameter.rsplit(".", 1)[-1]
        given = "messages" if request.url.path == CHATS else "prompt"
        param = given if field.startswith("prompts[") else field
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
