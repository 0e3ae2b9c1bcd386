"""Write the tests' fixture of a reward model: its folder, pairs, and what TRL says of both.

Needs torch, transformers and trl; the tests need none. Padding has a token of its own: with that
which ends an answer, transformers would read the score one token before.

python experiments/preferences/trl_reward_fixture.py
"""

import json
import shutil
from pathlib import Path

import datasets
import torch
import transformers
import trl

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "rlhf" / "fixtures" / "reward"
OF_DPO = FOLDER.parent / "trl"  # whose tokenizer and pairs these are, see trl_fixture.py
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CENTERING = 0.1
NAMES = ("loss", "accuracy", "margin", "mean_reward")
PROMPT = "Is 7 even?"
ANSWERS = ("Yes.", "No, never.", "Why?", "It is so, and always was.")


def write_model(tokenizer):
    """A random Llama with one score."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        num_labels=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
        **heads,
    )
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(FOLDER)
    return model


def measured(model, tokenizer, pairs):
    """TRL's means over the pairs."""
    options = dict(report_to=[], use_cpu=True, bf16=False, output_dir=str(FOLDER / "trainer"))
    data = datasets.Dataset.from_list(pairs)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(center_rewards_coefficient=CENTERING, **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in NAMES}


def scored(model, tokenizer, answer):
    """What transformers says of one answer, without padding."""
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}]
    tokens = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model.eval()(**tokens).logits.item()


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(OF_DPO / name, FOLDER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, pad_token="<user>")
    pairs = [json.loads(line) for line in (OF_DPO / "pairs.jsonl").read_text().splitlines()]
    model = write_model(tokenizer)
    figures = measured(model, tokenizer, pairs)
    scores = {answer: scored(model, tokenizer, answer) for answer in ANSWERS}
    about = {"trl": trl.__version__, "centering": CENTERING, "prompt": PROMPT}
    written = about | {"figures": figures, "scores": scores}
    (FOLDER / "trl.json").write_text(json.dumps(written, indent=1) + "\n")
    shutil.rmtree(FOLDER / "trainer", ignore_errors=True)
