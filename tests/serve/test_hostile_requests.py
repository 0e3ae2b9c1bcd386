"""Fields of requests at random from hostile values: each is answered, and the engine goes on."""

import json
import random

import pytest

httpx = pytest.importorskip("httpx", reason="the extra `test`")
from jaxscale.serve.openai import ChatRequest, CompletionRequest  # noqa: E402
from tests.serve.test_server import TOOLS, complete, continued, running  # noqa: E402

NUMBERS = [0, 1, -1, 2, 0.5, 5e-324, 1e-300, 1e300, -1e300, 10**12, 2**31, 2**63, -(10**40)]
OTHERS = [None, True, False, "x", "", [], {}, [1], ["a"], [""], [None], {"a": 1}, "\ud83d", "\x00"]
GRAMMARS = [
    {"regex": "(a|b){1,1000000}"},
    {"regex": "(?=a)b"},
    {"choice": ["a", "ab", ""]},
    {"grammar": "start: start"},
    {"json": "{}"},
    {"json": {"type": "string", "pattern": "^(a+)+$"}},
    {"json": {"$ref": "http://x/y"}},
    {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
    {"json": {"type": "integer", "minimum": 5, "maximum": 1}},
]
FUNCTIONS = [{"name": "", "parameters": {}}, {"name": "a", "parameters": 5}, {"name": 5}]
TOOL_LISTS = [TOOLS, [{}], *([{"type": "function", "function": each}] for each in FUNCTIONS)]
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields})


def draw(rng):
    """(path, fields) of a request, of which one to three are hostile."""
    is_chat = rng.random() < 0.4
    own = {"messages": [{"role": "user", "content": "hi"}]} if is_chat else {"prompt": "def f"}
    fields = {"model": "tiny", "max_tokens": 4} | own
    special = {"structured_outputs": GRAMMARS, "tools": TOOL_LISTS}
    for name in rng.choices(FIELDS, k=rng.choice([1, 1, 2, 3])):
        fields[name] = rng.choice(special.get(name, NUMBERS + OTHERS))
    return "/v1/chat/completions" if is_chat else "/v1/completions", fields


@pytest.mark.long
def test_each_is_answered_and_the_engine_goes_on():
    rng, statuses = random.Random(0), []
    with running() as (address, engine), httpx.Client(base_url=address, timeout=300) as client:
        for _ in range(3000):
            path, fields = draw(rng)
            kind = {"content-type": "application/json"}
            response = client.post(path, content=json.dumps(fields), headers=kind)
            statuses.append(response.status_code)
            assert response.status_code in (200, 400, 404), (path, fields)
            if response.status_code == 200:
                assert '"error"' not in response.text, (path, fields)
            else:
                assert response.json()["error"]["type"] == "invalid_request_error"
        assert complete(client).json()["choices"][0]["text"] == continued("def f", 9)[0]
        figures = engine.figures()
    assert not (figures.num_running or figures.num_waiting or figures.num_held)
    assert min(map(statuses.count, (200, 400))) > 300
