"""A chat in the terminal: template, special tokens, stop ids, and answers as they grow."""

import io
import itertools
import json

import pytest

from jaxscale import cli
from jaxscale.run import chat
from jaxscale.run.huggingface import import_model
from jaxscale.run.model import load
from jaxscale.run.run import load_run
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.run.test_huggingface import END, with_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + ':' + message.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
GREEDY = SamplingConfig(temperature=0.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of the run of an imported model that has a template."""
    root = tmp_path_factory.mktemp("chat")
    source = with_tokenizer(root, "llama")
    tokens = {"eos_token": END, "chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(tokens))
    import_model(source=str(source), directory=str(root / "run"))
    return root / "run"


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)


def answers(directory, monkeypatch, capsys, text, *settings):
    """What `jaxscale chat` prints in answer to the lines of a text."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    words = [f"--set={each}" for each in ("sampling.temperature=0.0", *settings)]
    status = cli.main(["chat", str(directory), *words])
    return status, *capsys.readouterr()


def test_each_line_is_answered_after_all_that_was_said(directory, model, monkeypatch, capsys):
    status, out, _ = answers(
        directory, monkeypatch, capsys, "hi\n\nwhy?\n", "max_new_tokens=3", "system=Be."
    )
    first, second = out.splitlines()
    said = f"s:Be.{END}u:hi{END}a:"
    assert (status, first) == (0, greedy(model, said, 3))
    assert second == greedy(model, f"{said}{first}{END}u:why?{END}a:", 3)


def greedy(model, text, num):
    tokens = []
    for part in text.split(END):
        tokens += [*model.tokenizer.encode(part), 94]
    tokens.pop()
    (new,) = generate_tokens(
        model.decoder,
        model.pure_params(),
        [tokens],
        sampling=GREEDY,
        max_new_tokens=num,
        num_tokens=95,
    )
    return model.tokenizer.decode(new)


def test_an_answer_grows_and_is_the_same_however_it_is_cut(model, monkeypatch):
    prompt = model.tokenizer.encode("abc")
    texts = []
    for streamed in (16, 4):
        monkeypatch.setattr(chat, "STREAMED", streamed)
        sampling = SamplingConfig(temperature=1.0, seed=3)
        texts.append(list(chat.stream(model, prompt, set(), 16, sampling)))
    whole, parts = texts
    assert len(whole) == 1 and len(parts) == 4 and parts[-1] == whole[0]
    assert all(part.startswith(before) for before, part in itertools.pairwise(parts))


def test_any_of_several_tokens_ends_an_answer(model):
    prompt = model.tokenizer.encode("abc")
    (whole,) = chat.stream(model, prompt, set(), 16, GREEDY)
    third = model.tokenizer.encode(whole.replace(" ", ""))[2]
    (cut,) = chat.stream(model, prompt, {94, third}, 16, GREEDY)
    assert len(cut) < len(whole) and whole.startswith(cut)


def test_the_stop_ids_are_those_of_config_and_generation_config(directory):
    folder = load_run([directory / "config.gin"]).path / "huggingface"
    assert chat.stop_ids(folder) == (94, 96)


def test_a_chat_that_has_become_too_long_is_refused(directory, monkeypatch, capsys):
    status, _, error = answers(directory, monkeypatch, capsys, "x" * 60 + "\n")
    assert status == 2 and "prompt + max_new_tokens - 1 <= model.max_length = 64" in error


def test_a_model_without_a_template_does_not_chat(tmp_path, monkeypatch):
    source = with_tokenizer(tmp_path, "llama")
    import_model(source=str(source), directory=str(tmp_path / "run"))
    run = load_run([tmp_path / "run" / "config.gin"])
    with pytest.raises(InputError, match="chat_template: given None"):
        chat.chat(run=run)
