"""Adapters by request: in one batch each sequence is as with its adapter alone."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.models.config import LoraConfig
from jaxscale.models.lora import Adapters, new_adapters, with_adapters
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import RequestConfig
from jaxscale.types import InputError
from tests.serve.examples import BYTE_MODEL, SIZES, byte_decoder, byte_params
from tests.serve.test_decoding import MODELS, decoder_of, params_of
from tests.serve.test_engine import GREEDY, SMALL

MODEL, NEW = MODELS["dense"], 6
PROMPT = [7, 3, 9, 37, 1, 5, 5, 2, 40]


def adapters(rank, targets, seed):
    lora = LoraConfig(rank=rank, alpha=4.0, targets=targets)
    config = dataclasses.replace(MODEL, lora=lora)
    shapes = jax.eval_shape(lambda: new_adapters(config, jax.random.key(0), "float32"))
    rng = np.random.default_rng(seed)
    return Adapters(lora, {path: rng.normal(size=leaf.shape) for path, leaf in shapes.items()})


GIVEN = {"sql": adapters(2, ("q", "v"), 0), "poem": adapters(3, ("o", "gate", "up", "down"), 1)}


def alone(name):
    """The tokens with an adapter, of a model that has it beside its matrices."""
    model, params = MODEL, params_of(MODEL)
    if name:
        model = dataclasses.replace(MODEL, lora=GIVEN[name].lora)
        params = with_adapters(params, model, GIVEN[name].leaves)
    run = decoder_of(MODEL)
    decoder = dataclasses.replace(run, config=model)
    return generate_tokens(decoder, params, [PROMPT], sampling=GREEDY, max_new_tokens=NEW)[0]


def test_several_adapters_in_one_batch_and_no_prefix_of_another():
    engine = Engine(
        decoder_of(MODEL), params_of(MODEL), config=EngineConfig(**SMALL), adapters=GIVEN
    )
    wanted = {name: alone(name) for name in (None, *GIVEN)}
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3
    for is_again in (False, True):
        requests = {}
        for name in wanted:
            config = RequestConfig(GREEDY, max_new_tokens=NEW, adapter=name)
            requests[engine.add(PROMPT, config)] = name
        found, cached = {request: [] for request in requests}, []
        while engine.has_work:
            for delta in engine.step():
                found[delta.request] += delta.tokens
                cached.append(delta.num_cached)
        assert {requests[request]: tokens for request, tokens in found.items()} == wanted
        assert set(cached) == {8 if is_again else 0}
    with pytest.raises(InputError, match="adapter: given 'prose'"):
        engine.add(PROMPT, RequestConfig(adapter="prose", max_new_tokens=NEW))


def test_an_adapter_called_none_shares_no_prefix_with_the_model_alone():
    adapters = {"None": GIVEN["sql"]}
    sizes = EngineConfig(**SMALL)
    engine = Engine(decoder_of(MODEL), params_of(MODEL), config=sizes, adapters=adapters)
    for name, wanted in ((None, alone(None)), ("None", alone("sql"))):
        config = RequestConfig(GREEDY, max_new_tokens=NEW, adapter=name)
        assert engine.generate([PROMPT], config)[0][0].tokens == wanted


@pytest.mark.long
def test_clients_ask_for_an_adapter_as_for_a_model():
    pytest.importorskip("fastapi", reason="the extra `serve`")
    from starlette.testclient import TestClient

    from jaxscale.serve.handler import Service
    from jaxscale.serve.server import make_app

    lora = LoraConfig(rank=2, alpha=8.0, targets=("q", "v"))
    config = dataclasses.replace(BYTE_MODEL, lora=lora)
    shapes = jax.eval_shape(lambda: new_adapters(config, jax.random.key(0), "float32"))
    rng = np.random.default_rng(0)
    given = Adapters(lora, {path: rng.normal(size=leaf.shape) for path, leaf in shapes.items()})
    engine = Engine(
        byte_decoder(),
        byte_params(),
        config=EngineConfig(**SIZES),
        tokenizer=ByteTokenizer(),
        adapters={"sql": given},
    )
    with TestClient(make_app(lambda: engine, Service("tiny"))) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["tiny", "sql"]
        assert client.get("/v1/models/sql").json()["parent"] == "tiny"
        fields = dict(prompt="def f", max_tokens=9, temperature=0)
        texts = {}
        for model in ("tiny", "sql"):
            found = client.post("/v1/completions", json=fields | {"model": model}).json()
            assert found["model"] == model
            texts[model] = found["choices"][0]["text"]
        assert texts["tiny"] != texts["sql"]
        refused = client.post("/v1/completions", json=fields | {"model": "poem"})
        assert refused.status_code == 404
