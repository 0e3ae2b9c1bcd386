"""Write the tests' fixture of PPO: what DeepSpeed-Chat's own code makes of answers and values.

Needs torch and a checkout of DeepSpeedExamples; the tests need neither. Answers fill their rows,
because DeepSpeed-Chat adds the score of one that ended earlier a token after its last.

python experiments/preferences/deepspeed_chat_fixture.py DeepSpeedExamples
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
FILE = "applications/DeepSpeed-Chat/dschat/rlhf/ppo_trainer.py"
ABSENT = (
    "deepspeed",
    "deepspeed.runtime.zero.partition_parameters",
    "deepspeed.accelerator",
    "dschat.utils.utils",
)
SETTINGS = dict(kl_ctl=0.1, clip_reward_value=5, cliprange=0.2, cliprange_value=0.2)
SIZES = ((3, 6), (1, 11), (8, 1))  # of each batch, tokens of a prompt and of an answer


def make_trainer(checkout):
    """DeepSpeed-Chat's trainer without models, of which only the arithmetic is called."""
    spec = importlib.util.spec_from_file_location("ppo_trainer", Path(checkout) / FILE)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ABSENT}):
        spec.loader.exec_module(module)
    trainer = object.__new__(module.DeepSpeedPPOTrainer)
    vars(trainer).update(SETTINGS, gamma=0.97, lam=0.9, compute_fp32_loss=False)
    return trainer


def judged(trainer, prompt, answer):
    """Numbers of two rows, and what the trainer makes of them."""
    shape, start = (2, prompt + answer - 1), prompt - 1
    names = ("log_p", "reference", "values", "new_log_p", "new_values")
    given = {name: torch.randn(shape, dtype=torch.float64) for name in names}
    given |= {"new_log_p": given["log_p"] + 0.3 * given["new_log_p"]}
    given |= {"new_values": given["values"] + 0.3 * given["new_values"]}
    scores, mask = (
        torch.tensor([7.0, -0.4], dtype=torch.float64),
        torch.ones(shape, dtype=torch.long),
    )
    prompts = types.SimpleNamespace(shape=(2, prompt))
    log_p, values = given["log_p"], given["values"]
    rewards = trainer.compute_rewards(prompts, log_p, given["reference"], scores, mask)
    advantages, returns = trainer.get_advantages_and_returns(values, rewards, start)
    own = {name: each[:, start:] for name, each in given.items()}
    mask = mask[:, start:]
    losses = (
        trainer.actor_loss_fn(own["new_log_p"], own["log_p"], advantages, mask),
        trainer.critic_loss_fn(own["new_values"], own["values"], returns, mask),
    )
    return {
        "start": start,
        "scores": scores.tolist(),
        "given": {name: each.tolist() for name, each in given.items()},
        "advantages": advantages.tolist(),
        "losses": [loss.item() for loss in losses],
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    trainer = make_trainer(sys.argv[1])
    written = [judged(trainer, *sizes) for sizes in SIZES]
    to = ROOT / "tests" / "rlhf" / "fixtures" / "deepspeed_chat.json"
    to.write_text(json.dumps(written) + "\n")
