"""The server over HTTP: OpenAI's form, streams, keys, errors, clients that go."""

import asyncio
import contextlib
import functools
import itertools
import json
import re
import threading
import time

import jax
import pytest

from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from tests.serve.examples import byte_decoder, byte_engine, byte_params

httpx = pytest.importorskip("httpx", reason="the extra `test`")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve`")
from jaxscale.data.chat_template import ChatTemplate  # noqa: E402
from jaxscale.serve.handler import Service  # noqa: E402
from jaxscale.serve.server import make_app  # noqa: E402

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
KEY = "a-key-of-this-test"
PAGE_POLICY = "content-security-policy"


@contextlib.contextmanager
def running(engine=None, template=TEMPLATE, **settings):
    """(address, engine) of a server in a thread."""
    engine = engine or byte_engine()
    template = ChatTemplate(template, "of the test", {})
    app = make_app(lambda: engine, Service("tiny", chat_template=template, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served():
    with running() as found:
        yield found


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served[0], timeout=60) as client:
        yield client


@functools.cache
def new_tokens(prompt, max_new_tokens):
    """Of a greedy continuation."""
    greedy = SamplingConfig(temperature=0)
    return generate_tokens(
        byte_decoder(),
        byte_params(),
        [list(prompt.encode())],
        sampling=greedy,
        max_new_tokens=max_new_tokens,
        eos_id=256,
        num_tokens=257,
    )[0]


def continued(prompt, max_new_tokens):
    """Text, number of tokens and reason of the end of a greedy continuation."""
    tokens = new_tokens(prompt, max_new_tokens)
    reason = "stop" if tokens[-1] == 256 else "length"
    return ByteTokenizer().decode(tokens), len(tokens), reason


def complete(client, timeout=60, **fields):
    fields = dict(model="tiny", prompt="def f", max_tokens=9, temperature=0) | fields
    return client.post("/v1/completions", json=fields, timeout=timeout)


def schema_of(kind):
    return {"type": "json_schema", "json_schema": {"schema": {"type": kind}}}


def events(response):
    """The data of a stream, after a look at its end."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_that_of_generate_in_openais_form(client):
    text, count, reason = continued("def f", 9)
    found = complete(client).json()
    assert found["object"] == "text_completion"
    assert found["choices"] == [
        {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    ]
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, count)
    assert found["weights_version"] == 0


def test_several_prompts_and_choices_come_in_their_order(client):
    found = complete(client, prompt=["def f", "x"], n=2).json()
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert texts == [continued(prompt, 9)[0] for prompt in ("def f", "def f", "x", "x")]
    assert found["usage"]["prompt_tokens"] == 6


def test_a_prompt_of_tokens_is_as_its_text(client):
    assert (
        complete(client, prompt=list(b"def f")).json()["choices"][0]["text"]
        == (continued("def f", 9)[0])
    )


def test_a_stream_adds_up_to_the_whole_with_its_usage(client):
    found = events(complete(client, stream=True, stream_options={"include_usage": True}))
    *chunks, last = found
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == continued("def f", 9)[0]
    assert chunks[-1]["choices"][0]["finish_reason"] == continued("def f", 9)[2]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == continued("def f", 9)[1]


def test_the_usage_tells_what_the_prefix_cache_has_spared(client):
    fields = dict(prompt=["b" * 20, "c" * 20], n=2, max_tokens=1)
    first = complete(client, **fields).json()
    again = complete(client, **fields, stream=True, stream_options={"include_usage": True})
    details = [each["usage"]["prompt_tokens_details"] for each in (first, events(again)[-1])]
    assert [each["cached_tokens"] for each in details] == [0, 2 * 16]


def test_seeds_repeat_and_differ(client):
    def draw(seed):
        return complete(client, temperature=1.0, seed=seed, max_tokens=20).json()["choices"][0]

    assert draw(1) == draw(1) != draw(2)


def test_a_stop_text_ends_a_completion_before_it(client):
    text = continued("def f", 9)[0]
    stop = text[3:5]
    found = complete(client, stop=stop).json()["choices"][0]
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"


def test_the_end_tokens_of_a_model_end_an_answer_unless_they_are_to_be_ignored():
    tokens = new_tokens("def f", 9)
    end = tokens[3]
    with running(stop_ids=(end,)) as (address, _), httpx.Client(base_url=address) as client:
        for changes, wanted in (
            ({}, tokens.index(end) + 1),
            (dict(ignore_eos=True), 9),
            (dict(ignore_eos=True, stop_token_ids=[end]), tokens.index(end) + 1),
        ):
            found = complete(client, **changes).json()
            assert found["usage"]["completion_tokens"] == wanted


def test_log_probabilities_are_spelt(client):
    choice = complete(client, logprobs=2, max_tokens=3).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 3
    assert all(value < 0 for value in logprobs["token_logprobs"])
    assert all(1 <= len(top) <= 2 for top in logprobs["top_logprobs"])


def test_the_bytes_of_a_part_of_a_character_are_not_those_of_its_sign(client):
    fields = dict(max_tokens=20, temperature=5, seed=1, logprobs=True, top_logprobs=20)
    choice = chat(client, **fields).json()["choices"][0]
    found = [top for each in choice["logprobs"]["content"] for top in each["top_logprobs"]]
    parts = [each for each in found if each["token"] == "\ufffd"]
    whole = [each for each in found if each["token"] != "\ufffd"]
    assert parts and all(each["bytes"] is None for each in parts)
    assert whole and all(bytes(each["bytes"]).decode() == each["token"] for each in whole)


def test_an_echo_scores_the_prompt_as_it_scores_new_tokens(client):
    """What evaluation harnesses ask for; the continuation as a prompt has the same scores."""
    new = complete(client, logprobs=1, max_tokens=3).json()["choices"][0]["logprobs"]
    fields = dict(prompt=[*b"def f", *new_tokens("def f", 3)], echo=True, logprobs=1, max_tokens=1)
    choice = complete(client, **fields).json()["choices"][0]
    assert choice["text"].startswith("def f")
    scores = choice["logprobs"]["token_logprobs"]
    assert scores[0] is None and len(scores) == len(choice["logprobs"]["tokens"]) == 9
    assert scores[5:8] == pytest.approx(new["token_logprobs"], abs=1e-4)
    asked = complete(client, prompt_logprobs=2, max_tokens=1).json()["choices"][0]
    assert [each and len(each) >= 2 for each in asked["prompt_logprobs"]] == [None] + [True] * 4


def test_a_chat_is_a_completion_of_its_template(client):
    messages = [{"role": "user", "content": "hi"}]
    fields = dict(model="tiny", messages=messages, max_tokens=9, temperature=0)
    found = client.post("/v1/chat/completions", json=fields).json()
    text = continued("[user]hi[assistant]", 9)[0]
    assert found["choices"][0]["message"] == {"role": "assistant", "content": text}
    chunks = events(client.post("/v1/chat/completions", json=fields | {"stream": True}))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text


def test_an_answer_follows_its_schema(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    found = complete(client, response_format=form, max_tokens=100, temperature=1.0).json()
    choice = found["choices"][0]
    if choice["finish_reason"] == "stop":  # a random model may write spaces
        assert json.loads(choice["text"])["a"] in (1, 2)
    fields = dict(structured_outputs={"choice": ["red", "blue"]}, max_tokens=9)
    assert complete(client, **fields).json()["choices"][0]["text"] in ("red", "blue")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2]}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }
]


def test_a_tool_call_comes_as_one(client):
    """Demanded, so that a model of random weights makes one; whole and streamed."""
    fields = dict(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        tools=TOOLS,
        tool_choice="required",
        max_tokens=100,
        temperature=0,
    )
    choice = client.post("/v1/chat/completions", json=fields).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"])["a"] in (1, 2)
    chunks = events(client.post("/v1/chat/completions", json=fields | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (streamed,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert streamed["function"] == call["function"] and streamed["index"] == 0
    assert "".join(delta["content"] for delta in deltas) == ""
    wrong = fields | {"tool_choice": {"type": "function", "function": {"name": "sub"}}}
    assert client.post("/v1/chat/completions", json=wrong).json()["error"]["param"] == "tool_choice"


def chat(client, **fields):
    messages = [{"role": "user", "content": "hi"}]
    fields = dict(model="tiny", messages=messages, temperature=0) | fields
    return client.post("/v1/chat/completions", json=fields)


def test_tools_of_which_a_model_would_not_hear_are_refused(client):
    for fields, param in (
        (dict(tools=TOOLS), "tools"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(tool_choice="nonsense"), "tool_choice"),
    ):
        response = chat(client, **fields)
        assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert chat(client, tools=TOOLS, tool_choice="none", max_tokens=1).status_code == 200
    neutral = dict(logit_bias={}, min_tokens=0, skip_special_tokens=True, length_penalty=1.0)
    assert chat(client, **neutral, some_field=[3], max_tokens=1).status_code == 200


def test_a_chat_without_a_length_fits_the_model_and_the_cache():
    for engine, most in ((byte_engine(), 128), (byte_engine(num_blocks=7), 57)):
        with running(engine) as (address, _), httpx.Client(base_url=address) as client:
            usage = chat(client, ignore_eos=True).json()["usage"]
            assert usage["total_tokens"] == most


def test_openais_client_works(served):
    openai = pytest.importorskip("openai", reason="the extra `test`")
    text = continued("def f", 9)[0]
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        ask = dict(model="tiny", prompt="def f", max_tokens=9, temperature=0)
        assert client.completions.create(**ask).choices[0].text == text
        stream = client.completions.create(**ask, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == text
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=3,
            logprobs=True,
            top_logprobs=2,
        )
        assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**ask | {"model": "other"})
        with pytest.raises(openai.BadRequestError, match="max_length"):
            client.completions.create(**ask | {"max_tokens": 1000})


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        (dict(model="other"), 404, "model", "expected 'tiny'"),
        (dict(prompt=""), 400, "prompt", "at least one token"),
        (dict(prompt="a" * 200), 400, "prompt", "model.max_length = 128"),
        (dict(prompt=[999]), 400, "prompt", "vocab_size = 258"),
        (dict(prompt=[]), 400, "prompt", "1 to"),
        (dict(prompt={"a": 1}), 400, "prompt", ""),
        (dict(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
        (dict(temperature=-1), 400, "temperature", "0 (greedy)"),
        (dict(top_p=0), 400, "top_p", "0 < top_p <= 1"),
        (dict(n=1000), 400, "n", "less than or equal to 128"),
        (dict(temperature="hot"), 400, "temperature", "number"),
        (dict(prompt_logprobs=99), 400, "prompt_logprobs", "less than or equal to 20"),
        (dict(temperature=1e300), 400, "temperature", "1e-06 to 1e+06"),
        (dict(repetition_penalty=1e-300), 400, "repetition_penalty", "equal to 0.01"),
        (dict(presence_penalty=1e300), 400, "presence_penalty", "equal to 2"),
        (dict(top_k=-5), 400, "top_k", "equal to -1"),
        (dict(stop_token_ids=[1] * 2000), 400, "stop_token_ids", "at most 1024"),
        (dict(logit_bias={"5": 1}), 400, "logit_bias", "not supported"),
        (dict(min_tokens=5), 400, "min_tokens", "not supported"),
        (dict(bad_words=["a"]), 400, "bad_words", "not supported"),
        (dict(guided_json={}), 400, "guided_json", "not supported"),
        (dict(stop=["x", ""]), 400, "stop", "at least one character"),
        (dict(structured_outputs={"regex": "(a"}), 400, "grammar", "can be compiled"),
        (dict(response_format={"type": "json_schema"}), 400, "response_format", "a schema"),
        (dict(response_format=schema_of("nonsense")), 400, "grammar", "can be compiled"),
        (dict(structured_outputs={"choice": []}), 400, "structured_outputs", "a choice"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_in_openais_form(client, fields, status, param, message):
    for stream in (False, True):
        response = complete(client, **fields, stream=stream)
        error = response.json()["error"]
        assert response.status_code == status
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert message in error["message"]


def test_numbers_beyond_those_of_the_device_end_no_engine(client):
    wanted = complete(client, temperature=1, seed=3).json()["choices"]
    for top_k in (10**12, 2**31, 258):
        asked = dict(temperature=1, seed=3, top_k=top_k, priority=10**40, stop_token_ids=[10**30])
        assert complete(client, **asked).json()["choices"] == wanted


def test_what_is_no_json_or_no_page_is_refused_and_the_server_goes_on(client):
    kind = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=b"{nonsense", headers=kind)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]
    assert client.post("/v1/completions", content=b"\xff").status_code == 400
    head = '{"model":"tiny","prompt":"a","response_format":{"type":"json_schema","json_schema":'
    for depth in (5_000, 100_000):  # what ends a recursion, of a parser or of a grammar
        schema = '{"schema":' + '{"items":' * depth + "{}" + "}" * (depth + 1)
        response = client.post("/v1/completions", content=f"{head}{schema}}}}}", headers=kind)
        assert response.status_code == 400
    assert client.get("/nowhere").status_code == 404
    assert "error" in client.get("/nowhere").json()
    assert complete(client).status_code == 200


def test_prompts_for_which_the_cache_has_no_room_wait(client):
    """12 of 90 tokens; the cache has 64 blocks of 8."""
    found = complete(client, prompt=["a" * 60] * 12, max_tokens=30).json()
    assert {choice["text"] for choice in found["choices"]} == {continued("a" * 60, 30)[0]}


def test_the_chat_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers[PAGE_POLICY]
    assert not re.search(r"(src|href)=|https?://|innerHTML", page.text)


def test_health_and_metrics(client):
    complete(client)
    assert client.get("/health").json() == {"status": "ok"}
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(
        line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")
    )
    assert float(values['vllm:num_requests_running{model_name="tiny"}']) == 0
    assert float(values['vllm:generation_tokens_total{model_name="tiny"}']) >= 9
    assert float(values['vllm:time_to_first_token_seconds_count{model_name="tiny"}']) >= 1
    assert (
        float(values['vllm:e2e_request_latency_seconds_bucket{model_name="tiny",le="+Inf"}']) >= 1
    )


def num_held(engine):
    figures = engine.figures()
    return figures.num_held + figures.num_running + figures.num_waiting


def wait_for_nothing_held(engine):
    for _ in range(300):
        if not num_held(engine) and not engine.has_work:
            return
        time.sleep(0.02)
    raise AssertionError(f"{engine.figures()} after all clients have gone")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_takes_its_sequences_along(served, stream):
    """Also several at once, some of which still wait."""
    address, engine = served
    fields = dict(model="tiny", prompt=["a", "b"], n=6, max_tokens=120, ignore_eos=True)

    async def leave():
        async with httpx.AsyncClient(base_url=address) as client:
            body = fields | {"stream": stream}
            with contextlib.suppress(httpx.ReadTimeout):
                async with client.stream("POST", "/v1/completions", json=body, timeout=0.15) as r:
                    async for _ in r.aiter_lines():
                        return

    before = engine.figures().num_new_tokens
    asyncio.run(leave())
    wait_for_nothing_held(engine)
    assert engine.figures().num_new_tokens - before < 12 * 120


def test_a_key_is_asked_for():
    with running(api_keys=(KEY, "another")) as (address, _):
        get = functools.partial(httpx.get, f"{address}/v1/models")
        assert get().status_code == 401
        response = get(headers={"authorization": "Bearer wrong"})
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert get(headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_page_of_another_site_asks_for_nothing():
    """A browser sends its requests to a loopback address too, and names the site."""
    with running(read_params=lambda step: byte_params()) as (address, engine):
        for site in ("cross-site", "same-site"):
            response = httpx.post(f"{address}/v1/pause", headers={"sec-fetch-site": site})
            assert response.status_code == 403
            assert "another site" in response.json()["error"]["message"]
        assert not engine.is_paused
        response = httpx.post(f"{address}/v1/pause", headers={"sec-fetch-site": "same-origin"})
        assert response.json() == {"status": "paused"}


def test_a_training_loop_pauses_the_engine_and_gives_it_other_weights(client):
    """Requests that run go on with them; a server that is not to be steered has no such page."""
    assert client.post("/v1/pause").status_code == 404
    other = jax.tree.map(lambda leaf: leaf * 1.1, byte_params())
    with (
        running(read_params=lambda step: other) as (address, _),
        httpx.Client(base_url=address, timeout=60) as steering,
    ):
        assert steering.post("/v1/pause").json() == {"status": "paused"}
        with contextlib.suppress(httpx.ReadTimeout):
            complete(steering, timeout=0.3)
        steering.post("/v1/resume")
        assert complete(steering).json()["choices"][0]["text"] == continued("def f", 9)[0]
        assert steering.post("/v1/weights", json={}).json() == {"weights_version": 1}
        changed = complete(steering).json()
        assert changed["weights_version"] == 1
        chunks = events(complete(steering, stream=True))
        assert {chunk["weights_version"] for chunk in chunks} == {1}
        assert changed["choices"][0]["text"] != continued("def f", 9)[0]


def test_a_request_times_out_while_the_engine_is_paused():
    with (
        running(read_params=lambda step: byte_params(), timeout_s=0.3) as (address, _),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        client.post("/v1/pause")
        found = complete(client, n=2, max_tokens=50).json()
        assert [each["finish_reason"] for each in found["choices"]] == ["timeout"] * 2
        client.post("/v1/resume")
        assert complete(client, max_tokens=1).json()["usage"]["completion_tokens"] == 1


def test_an_engine_that_fails_in_the_middle_of_a_stream_says_so_there():
    engine = byte_engine()
    step, num_steps = engine.step, itertools.count()

    def failing():
        if next(num_steps) == 5:
            raise ValueError("planted")
        return step()

    engine.step = failing
    with running(engine) as (address, _), httpx.Client(base_url=address, timeout=10) as client:
        response = complete(client, stream=True, max_tokens=50, ignore_eos=True)
        *chunks, last = [line for line in response.text.split("\n\n") if line]
        assert response.status_code == 200 and chunks
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and "planted" in error["message"]


def test_an_engine_that_fails_is_reported_and_nobody_hangs(monkeypatch):
    with running() as (address, engine):

        def fail():
            raise ValueError("planted")

        monkeypatch.setattr(engine, "step", fail)
        with httpx.Client(base_url=address, timeout=10) as client:
            for _ in range(2):
                response = complete(client)
                assert response.status_code == 503
                assert "planted" in response.json()["error"]["message"]
            assert client.get("/health").status_code == 503
