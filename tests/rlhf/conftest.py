"""A language model that was trained on chats, and what teaches it preferences."""

import json

import pytest

from jaxscale import cli
from tests.data.chat_tokenizer import as_messages, write_chat_tokenizer
from tests.run.runs import ROOT

CHATS = """
from __gin__ import dynamic_registration
from jaxscale import run
include '{root}/tests/tiny.gin'
CORPUS = ()
CACHE = '{folder}/cache'
DIRECTORY = '{folder}/base'
run.ModelConfig.vocab_size = 300
run.ModelConfig.max_length = 64
run.DataConfig.sequence_length = 64
run.DataConfig.sources = (@run.ChatSource(),)
run.ChatSource.paths = ('{folder}/chats.jsonl',)
run.ChatSource.tokenizer = '{folder}'
run.TokenizerConfig.kind = 'huggingface'
run.TokenizerConfig.path = '{folder}'
run.TrainConfig.steps = 2
"""
ANSWERS = {"chosen": "Hi there", "rejected": "Four."}
PROMPTS = [f"{number * 7 % 40} and two?" for number in range(40)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A base and adapters beside it, and the pairs that follow."""
    path = tmp_path_factory.mktemp("aligned")
    write_chat_tokenizer(path)

    def chat(prompt, answer):
        return as_messages([("user", prompt), ("assistant", answer)])

    chats = [{"messages": chat(prompt, "So.")} for prompt in PROMPTS]
    pairs = [{name: chat(prompt, text) for name, text in ANSWERS.items()} for prompt in PROMPTS]
    for name, lines in (("chats", chats), ("pairs", pairs)):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "chats.gin").write_text(CHATS.format(root=ROOT, folder=path))
    assert cli.main(["pretrain", str(path / "chats.gin")]) == 0
    words = [str(path / "base"), str(path / "adapted"), "--set=lora.rank=2"]
    assert cli.main(["adapt", *words]) == 0
    return path
