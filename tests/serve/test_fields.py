"""Fields of requests that OpenAI's and vLLM's servers know: what they change, or a refusal."""

import json
import math

import pytest

from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.serve.requests import Completion, TokenLogprobs
from tests.serve.examples import byte_engine

httpx = pytest.importorskip("httpx", reason="the extra `test`")
from jaxscale.serve.answers import Form, Usage  # noqa: E402
from tests.serve.test_server import TEMPLATE, TOOLS, chat, complete, events, running  # noqa: E402


@pytest.fixture(scope="module")
def client():
    with running() as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        yield client


class Begun(ByteTokenizer):
    """Begins each text with a token."""

    def encode(self, text):
        return [1, *super().encode(text)]


def test_what_begins_a_text_is_put_there_or_not_as_asked():
    engine = byte_engine(tokenizer=Begun())
    with running(engine) as (address, _), httpx.Client(base_url=address, timeout=60) as client:

        def num_prompt(ask, **fields):
            return ask(client, max_tokens=1, **fields).json()["usage"]["prompt_tokens"]

        asked = (None, True, False)
        assert [num_prompt(complete, add_special_tokens=each) for each in asked] == [6, 6, 5]
        assert num_prompt(complete) == 6
        # The template writes what begins a chat.
        bare = num_prompt(chat)
        asked = (None, False, True)
        counts = [num_prompt(chat, add_special_tokens=each) for each in asked]
        assert counts == [bare, bare, bare + 1]


def test_an_answer_calls_one_tool_where_it_may_not_call_several():
    call = '<tool_call>{"name":"add","arguments":{}}</tool_call>'
    template = TEMPLATE + "{# tools: <tool_call> #}"
    fields = dict(tools=TOOLS, structured_outputs={"choice": [call + call]}, max_tokens=105)
    with (
        running(template=template) as (address, _),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        for is_parallel, num in ((True, 2), (None, 2), (False, 1)):
            asked = fields | {"parallel_tool_calls": is_parallel}
            choice = chat(client, **asked).json()["choices"][0]
            assert len(choice["message"]["tool_calls"]) == num
            assert choice["finish_reason"] == "tool_calls"
            chunks = events(chat(client, **asked, stream=True))
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
            assert [call["index"] for call in calls] == list(range(num))
            assert "".join(delta["content"] for delta in deltas) == ""
            assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_equal_prompts_without_a_seed_draw_apart_and_a_seed_draws_the_same(client):
    fields = dict(prompt=["def f"] * 4, temperature=1, max_tokens=9)
    choices = complete(client, **fields).json()["choices"]
    assert len({choice["text"] for choice in choices}) == 4
    choices = complete(client, **fields, seed=3).json()["choices"]
    alone = complete(client, temperature=1, max_tokens=9, seed=3).json()["choices"]
    assert {choice["text"] for choice in choices} == {alone[0]["text"]}


def test_each_continuation_of_an_echo_has_the_scores_of_the_prompt(client):
    fields = dict(prompt=["def f", "x"], n=2, echo=True, logprobs=1, temperature=1, max_tokens=3)
    choices = complete(client, **fields).json()["choices"]
    for choice, prompt in zip(choices, ["def f"] * 2 + ["x"] * 2, strict=True):
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]).startswith(prompt)
        lengths = {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs")}
        assert lengths == {len(logprobs["tokens"])} and len(logprobs["tokens"]) > len(prompt)
    scores = [choice["logprobs"]["token_logprobs"][:5] for choice in choices[:2]]
    assert scores[0] == scores[1]
    asked = complete(client, n=2, prompt_logprobs=1, max_tokens=1).json()["choices"]
    assert asked[0]["prompt_logprobs"] == asked[1]["prompt_logprobs"]
    assert len(asked[0]["prompt_logprobs"]) == 5


def test_the_token_drawn_is_among_the_most_probable_and_equal_texts_do_not_hide_one_another():
    """Harnesses compare it with the largest; a part of a character has the text of any other."""

    def top(drawn, logprob, *others):
        choice = Completion(tokens=[drawn], logprobs=[TokenLogprobs(logprob, others)])
        answer = Form("tiny", False, ByteTokenizer()).whole([choice], [[65]], Usage())
        return answer["choices"][0]["logprobs"]["top_logprobs"][0]

    assert top(65, -3.0, (66, -0.1)) == {"B": -0.1, "A": -3.0}
    assert top(200, -3.0, (201, -0.1), (202, -2.0)) == {"\ufffd": -0.1}


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_forbidden_token_has_a_log_probability_that_json_knows(is_chat):
    """It is -inf, of which Python's JSON makes something that no client can read, or an error."""
    score = TokenLogprobs(-math.inf, ((66, -0.1), (67, -math.inf)))
    choice = Completion(tokens=[65], logprobs=[score], prompt_logprobs=(score,))
    answer = Form("tiny", is_chat, ByteTokenizer()).whole([choice], [[65, 68]], Usage())
    text = json.dumps(answer, allow_nan=False)
    assert text.count("-9999.0") >= 4


def test_a_chat_that_is_too_long_is_told_as_openai_tells_it(client):
    error = chat(client, messages=[{"role": "user", "content": "a" * 200}]).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("ask", "fields", "param"),
    [
        (complete, dict(prompt_logprobs=1, stream=True), "prompt_logprobs"),
        (complete, dict(prompt_logprobs=1, echo=True), "prompt_logprobs"),
        (complete, dict(structured_outputs={"regex": "a", "whitespace_pattern": " "}), None),
        (complete, dict(return_token_ids=True), "return_token_ids"),
        (complete, dict(cache_salt="mine"), "cache_salt"),
        (complete, dict(add_special_tokens="no"), "add_special_tokens"),
        (chat, dict(prompt_logprobs=1, stream=True), "prompt_logprobs"),
        (chat, dict(echo=True), "echo"),
        (chat, dict(parallel_tool_calls="no"), "parallel_tool_calls"),
        (chat, dict(verbosity="high"), "verbosity"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_and_not_ignored(client, ask, fields, param):
    response = ask(client, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == (param or "structured_outputs")
