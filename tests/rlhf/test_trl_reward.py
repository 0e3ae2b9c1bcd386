"""What transformers and TRL say of a reward model and pairs, from files to figures and back."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxscale import cli
from jaxscale.checkpoint.safetensors import NewTensor, SafetensorsSource, write_safetensors
from jaxscale.data.chat_template import read_chat_template
from jaxscale.data.prompts import Prompt
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.data.tokenizer_kinds import ByteTokenizer
from jaxscale.rlhf.rollouts import Answer
from jaxscale.run.model import opened
from jaxscale.run.reward import RewardModel, score
from jaxscale.types import InputError

FIXTURE = Path(__file__).parent / "fixtures" / "reward"
WANTED = json.loads((FIXTURE / "trl.json").read_text())
PAIRS = """
from __gin__ import dynamic_registration
from jaxscale import run
include '{folder}/imported/config.gin'
run.Run.loss = @run.reward_loss
run.reward_loss.compared = 'last_token'
run.reward_loss.centering = {centering}
run.DataConfig.sources = (@run.PreferenceSource(),)
run.PreferenceSource.paths = ('{pairs}',)
run.PreferenceSource.tokenizer = '{folder}/imported/huggingface'
run.DataConfig.held_out_fraction = 0.999999
run.DataConfig.sequence_length = 128
run.DataConfig.batch_size = 8
run.DataConfig.cache_directory = '{folder}/cache'
run.MeshConfig.data = 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward")
    assert cli.main(["import", str(FIXTURE), f"--set=directory={path}/imported"]) == 0
    return path


def test_loss_and_scores_of_pairs_are_those_of_trl(folder):
    """Written by experiments/preferences/trl_reward_fixture.py."""
    pairs = FIXTURE.parent / "trl" / "pairs.jsonl"
    file = folder / "pairs.gin"
    file.write_text(PAIRS.format(folder=folder, pairs=pairs, centering=WANTED["centering"]))
    assert cli.main(["evaluate", str(file)]) == 0
    found = json.loads((folder / "imported" / "evaluation_0.json").read_text())
    rewards = [found[f"held_out/{name}_reward"] for name in ("chosen", "rejected")]
    found["held_out/mean_reward"] = sum(rewards) / 2
    for name, value in WANTED["figures"].items():
        assert found[f"held_out/{name}"] == pytest.approx(value, rel=2e-5), name


def test_scores_of_answers_are_those_of_transformers(folder, capsys):
    answers, scores = zip(*WANTED["scores"].items(), strict=True)
    found = score(run=folder / "imported", texts=answers, prompt=WANTED["prompt"])
    assert found == pytest.approx(scores, rel=2e-5)
    assert f"{scores[0]:.4f}" in capsys.readouterr().out
    # Of a folder of Hugging Face, and of a text as it stands.
    (whole,) = score(run=FIXTURE, texts=f"<user>{WANTED['prompt']}<end><assistant>Why?<end>")
    assert np.isfinite(whole) and whole != scores[2]
    words = [str(FIXTURE), f"--set=prompt={WANTED['prompt']}", "--set=texts=Why?"]
    assert cli.main(["score", *words]) == 0
    assert f"{scores[2]:.4f}" in capsys.readouterr().out


def test_what_is_exported_is_what_was_imported(folder):
    exported = folder / "exported"
    assert cli.main(["export", str(folder / "imported"), str(exported)]) == 0
    about, written = (
        json.loads((each / "config.json").read_text()) for each in (FIXTURE, exported)
    )
    for name in ("architectures", "id2label", "label2id", "pad_token_id", "tie_word_embeddings"):
        assert written[name] == about[name], name
    given, found = (SafetensorsSource(each).leaves() for each in (FIXTURE, exported))
    assert given.keys() == found.keys() and given["score.weight"].shape == (1, 16)
    for name, leaf in given.items():
        np.testing.assert_array_equal(found[name][()], leaf[()], err_msg=name)


BAD = {
    "a prompt that ends it": (
        ["--set=prompt=So<end>", "--set=texts=a"],
        "the special token '<end>'",
    ),
    "nothing": (["--set=texts="], "texts[0]: given '0 tokens', expected 1 to max_length = 128"),
    "too much": (["--set=texts=" + "e" * 129], "texts[0]: given '129 tokens'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_refused(capsys, name):
    words, message = BAD[name]
    assert cli.main(["score", str(FIXTURE), *words]) == cli.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_model_without_a_value_head_scores_nothing(capsys):
    other = FIXTURE.parent / "trl"
    assert cli.main(["score", str(other), "--set=texts=a"]) == cli.EXIT_BAD_INPUT
    assert "use_value_head: given False, expected True for a model that" in capsys.readouterr().err


def test_several_labels_are_no_score(tmp_path, capsys):
    shutil.copytree(FIXTURE, tmp_path / "many")
    leaves = {name: leaf[()] for name, leaf in SafetensorsSource(FIXTURE).leaves().items()}
    leaves["score.weight"] = np.zeros((3, 16), np.float32)
    tensors = [
        NewTensor(name, leaf.shape, leaf.dtype, functools.partial(np.copy, leaf))
        for name, leaf in leaves.items()
    ]
    write_safetensors(tmp_path / "many", tensors, max_shard_bytes=10**9)
    assert cli.main(["score", str(tmp_path / "many"), "--set=texts=a"]) == cli.EXIT_BAD_INPUT
    assert "score.weight: given (3, 16), expected (1, 16)" in capsys.readouterr().err


def test_logits_of_a_reward_model_are_refused(capsys):
    words = ["--set=prompts=a", "--set=max_new_tokens=5"]
    assert cli.main(["generate", str(FIXTURE), *words]) == cli.EXIT_BAD_INPUT
    assert "use_value_head: given True, expected False for logits" in capsys.readouterr().err


def test_what_is_written_is_rewarded_with_its_score():
    """By tokens, with the one that ends an answer; of several lengths at once."""
    folder = opened(FIXTURE)
    tokenizer = load_tokenizer(folder.data.tokenizer)
    template = read_chat_template(FIXTURE)
    texts, question = ("No.", "Yes.", "No, it is odd."), "Is 7 even?"
    tokens = template.encode([{"role": "user", "content": question}], tokenizer)
    end = tokenizer.special_tokens["<end>"]
    answers = [Answer([*tokenizer.encode_part(text), end], text) for text in texts]
    model = RewardModel(str(FIXTURE))
    prompts = [Prompt("here", tokens, {})] * len(texts)
    model.check(tokenizer, prompts, 10)
    found = model(prompts, answers)
    wanted = score(run=FIXTURE, texts=texts, prompt=question)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(set(found)) == len(texts)
    with pytest.raises(InputError, match="a reward model with the tokenizer of the run"):
        model.check(ByteTokenizer(), prompts, 10)
    with pytest.raises(InputError, match=r"max_length = 128, here \d+ \+ 128"):
        model.check(tokenizer, prompts, 128)
