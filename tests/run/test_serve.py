"""A run's directory in a pipeline and behind the command `serve`."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from jaxscale import cli
from jaxscale.models.quantised import QuantisedConfig
from jaxscale.run.huggingface import import_model
from jaxscale.run.model import load
from jaxscale.run.pipeline import make_engine, pipeline
from jaxscale.run.run import load_run
from jaxscale.run.serve import _read_params, make_service, read_keys
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.run.test_huggingface import with_tokenizer
from tests.run.test_model import NEW, loaded, run  # noqa: F401

pytest.importorskip("fastapi", reason="the extra `serve`")
from jaxscale.serve.handler import Handler
from jaxscale.serve.openai import ChatRequest

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingConfig(temperature=0)
SMALL = EngineConfig(token_budget=16, max_sequences=4, block_size=8, max_prompts=4, num_blocks=32)
SET_SMALL = [
    "engine.token_budget=16",
    "engine.max_sequences=4",
    "engine.block_size=8",
    "engine.max_prompts=4",
    "engine.num_blocks=32",
]


def test_a_pipeline_continues_as_generate_does(run, loaded):  # noqa: F811
    prompts = ["def f", "x", "def f(a, b)"]
    wanted = loaded.generate(prompts, max_new_tokens=NEW, sampling=GREEDY)
    answer = pipeline(run.directory, config=SMALL)
    found = answer(prompts, sampling=GREEDY, max_new_tokens=NEW)
    assert [each.text for (each,) in found] == wanted
    assert answer("x", sampling=GREEDY, max_new_tokens=NEW)[0].text == wanted[1]
    eight = QuantisedConfig(bits=8)
    quantised = load(run.directory, quantisation=eight)
    engine = make_engine(run.directory, config=SMALL, quantisation=eight)
    request = RequestConfig(GREEDY, max_new_tokens=NEW)
    in_eight = quantised.generate("x", max_new_tokens=NEW, sampling=GREEDY)
    assert [engine.generate(["x"], request)[0][0].text] == in_eight
    engine.swap(_read_params(load_run([f"{run.directory}/config.gin"]), 1, eight, None))
    assert [engine.generate(["x"], request)[0][0].text] == in_eight
    spread = pipeline(run.directory, config=SMALL, tensor=2)
    assert spread("x", sampling=GREEDY, max_new_tokens=NEW)[0].text == wanted[1]


def test_an_imported_model_is_served_with_its_template_and_its_end_tokens(tmp_path):
    source = with_tokenizer(tmp_path)
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}<|endoftext|>"
    )
    (source / "generation_config.json").write_text('{"eos_token_id": [94, 7]}')
    directory = tmp_path / "run"
    import_model(source=str(source), directory=str(directory))
    straight, imported = (
        make_engine(where, config=SMALL).generate([[3, 4, 5]], RequestConfig(GREEDY, NEW))
        for where in (source, directory)
    )
    assert straight == imported
    check_ends(pipeline(directory, config=SMALL))
    service = make_service(load_run([directory / "config.gin"]))
    assert (service.model, service.stop_ids) == ("run", (94, 96, 7))

    async def prompt_of(content):
        handler = Handler(make_engine(directory, config=SMALL), service)
        try:
            message = {"role": "user", "content": content}
            body = ChatRequest(model="run", messages=[message], max_tokens=2)
            return handler.chat(body)
        finally:
            handler.close()

    asked = asyncio.run(prompt_of("hi"))
    assert asked.prompts == [[ord(each) - 33 for each in "user:hi"] + [94]]
    assert asked.config.stop_ids == (94, 96, 7)
    spelt = asyncio.run(prompt_of("x<|endoftext|>y")).prompts[0]
    assert spelt.count(94) == 1, "what a message spells is text"


def check_ends(answer):
    """A pipeline's continuations end where those of the server do, at the tokens 94 and 7."""
    config = RequestConfig(SamplingConfig(seed=1), max_new_tokens=20, num_sequences=32)
    free, ended = (answer("x", config, ignore_eos=each) for each in (True, False))
    for long, short in zip(free, ended, strict=True):
        stop = next((i for i, token in enumerate(long.tokens) if token in (94, 7)), 20)
        assert short.tokens == long.tokens[: stop + 1]
    assert {tokens[-1] for each in ended if len(tokens := each.tokens) < 20} == {94, 7}


def test_keys_are_read_from_a_file(tmp_path):
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert read_keys(str(tmp_path / "keys")) == ("one", "two")
    (tmp_path / "none").write_text("\n")
    for name, message in (("none", "a key a line"), ("absent", "No such file")):
        with pytest.raises(InputError, match=message):
            read_keys(str(tmp_path / name))


def test_a_port_that_is_taken_and_a_directory_without_a_run_exit_2(
    run,  # noqa: F811
    tmp_path,
    capsys,
):
    pytest.importorskip("uvicorn", reason="the extra `serve`")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", run.directory, "--set", f"port={port}"]) == 2
    expected = f"127.0.0.1:{port}', expected an address of this machine that is free"
    assert expected in capsys.readouterr().err
    assert cli.main(["serve", run.directory, "--set", "port=99999"]) == 2
    assert "0 <= port <= 65535" in capsys.readouterr().err
    name = Path(run.directory).name
    adapters = f"adapters={{{name!r}: 'folder'}}"
    assert cli.main(["serve", run.directory, "--set", "port=0", "--set", adapters]) == 2
    assert "other names than the model's" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "expected an existing gin file" in capsys.readouterr().err


@pytest.mark.processes
def test_the_command_serves_a_directory_and_finishes_what_runs_when_it_is_ended(run):  # noqa: F811
    pytest.importorskip("uvicorn", reason="the extra `serve`")
    overrides = [f"--set={each}" for each in (*SET_SMALL, "port=0", "warm_up=False")]
    command = [sys.executable, "-m", "jaxscale", "serve", run.directory, *overrides]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            address = line.split()[-1]
            assert address.startswith("http://127.0.0.1:"), line
            body = dict(model=Path(run.directory).name, prompt="def f", max_tokens=20, n=4)
            request = urllib.request.Request(
                f"{address}/completions",
                json.dumps(body | {"stream": True, "ignore_eos": True}).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                first = response.readline()
                server.send_signal(signal.SIGTERM)
                rest = response.read().decode()
            assert first.startswith(b"data: ")
            assert rest.count('"finish_reason": "length"') == 4
            assert rest.endswith("data: [DONE]\n\n")
            assert server.wait(timeout=30) == 128 + signal.SIGTERM
        finally:
            server.kill()
