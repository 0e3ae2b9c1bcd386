"""A client that goes before its answer has begun leaves nothing behind."""

import asyncio
import contextlib
import json
import threading

import pytest

from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.worker import Frontend
from tests.serve.examples import byte_engine

pytest.importorskip("fastapi", reason="the extra `serve`")
from starlette.requests import ClientDisconnect

from jaxscale.serve.handler import Service
from jaxscale.serve.server import make_app


def test_prompts_that_are_added_when_their_client_has_gone_are_dropped():
    """It goes while the engine is busy, and so before it knows of them."""
    engine, is_told = byte_engine(), threading.Event()

    async def run():
        frontend = Frontend(engine)
        try:
            busy = asyncio.ensure_future(frontend.call(lambda _: is_told.wait(10)))
            config = RequestConfig(max_new_tokens=100, ignore_eos=True)
            adding = asyncio.ensure_future(frontend.submit([[1], [2]], [config] * 2))
            await asyncio.sleep(0.05)
            adding.cancel()
            is_told.set()
            await asyncio.wait([busy, adding])
            assert adding.cancelled()
            # The answer to a call comes behind all that was asked before it.
            for _ in range(3):
                figures = await frontend.call(lambda engine: engine.figures())
            assert not frontend._answers
            return figures
        finally:
            frontend.close()

    figures = asyncio.run(run())
    assert (figures.num_held, figures.num_running, figures.num_waiting) == (0, 0, 0)


BODY = dict(model="tiny", prompt=["a", "b"], n=3, max_tokens=120, ignore_eos=True, stream=True)


async def leave(app, spec_version):
    """A client that has gone by the time at which the first bytes would be sent."""
    messages = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

    async def receive():
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(_):
        raise OSError("the client has gone")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    # What the server that calls would meet, by the version.
    with contextlib.suppress(OSError, ClientDisconnect):
        await app(scope, receive, send)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])  # which tell of a disconnect in two ways
def test_nothing_is_drawn_or_kept_for_a_client_that_has_gone(spec_version):
    engine = byte_engine()
    app = make_app(lambda: engine, Service("tiny"))

    async def run():
        async with app.router.lifespan_context(app):
            for _ in range(3):
                await leave(app, spec_version)
            handler = app.state.handler
            assert not handler._frontend._answers
            for _ in range(300):
                if not engine.has_work:
                    break
                await asyncio.sleep(0.01)
            return await handler.figures()

    metrics = asyncio.run(run())
    figures = engine.figures()
    assert (figures.num_held, figures.num_running, figures.num_waiting) == (0, 0, 0)
    assert figures.num_new_tokens < 3 * 6 * 120 / 4
    label = 'model_name="tiny",finished_reason'
    assert f'vllm:request_success_total{{{label}="abort"}} 18' in metrics
