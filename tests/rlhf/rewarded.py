"""A run that learns from rewards of its answers, and what it is compared on."""

import json

import pytest

from tests.data.chat_tokenizer import as_messages, write_chat_tokenizer
from tests.run.runs import ROOT

RUN = """
from __gin__ import dynamic_registration
from jaxscale import run
from tests.rlhf import counting
include '{root}/tests/tiny.gin'
CORPUS = ()
CACHE = '{folder}/cache'
DIRECTORY = '{folder}/run'
run.ModelConfig.vocab_size = 300
run.DataConfig.batch_size = 64
run.DataConfig.sources = (@run.PromptSource(),)
run.PromptSource.paths = ('{folder}/prompts.jsonl',)
run.PromptSource.tokenizer = '{folder}'
run.TokenizerConfig.kind = 'huggingface'
run.TokenizerConfig.path = '{folder}'
run.Run.loss = @run.policy_loss
run.policy_loss.beta = 0.0
run.Run.rollouts = @run.RolloutConfig()
run.RolloutConfig.rewards = {{'digits': @counting.digits}}
run.RolloutConfig.num_answers = 8
run.RolloutConfig.max_new_tokens = 8
run.RolloutConfig.end = '<|end|>'
run.MeshConfig.data = 8
run.MeshConfig.tensor = 1
run.TrainConfig.steps = 40
run.TrainConfig.evaluate_every = 40
run.Run.evaluators = {{'held_out': @run.HeldOutRewards()}}
run.HeldOutRewards.num_prompts = 4
run.CheckpointConfig.save_every = 40
run.OptimizerConfig.learning_rate = 0.02
"""


def write_run(path, more=""):
    """A tokenizer, forty prompts with an answer beside each, and the run's file."""
    write_chat_tokenizer(path)
    asked = [[("user", f"{number * 7 % 40} and two?")] for number in range(40)]
    lines = [{"messages": as_messages(chat), "answer": "Four."} for chat in asked]
    (path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "run.gin").write_text(RUN.format(root=ROOT, folder=path) + more)


# Of all axes that share the tokens of a row; the default tests take the first.
MESHES = [
    dict(data=2, sequence=2, zero=3),
    *[
        pytest.param(sizes, marks=pytest.mark.long)
        for sizes in (
            dict(tensor=2, sequence=2),
            dict(data=2, tensor=2),
            dict(sequence=2, ring=2),
        )
    ],
]
