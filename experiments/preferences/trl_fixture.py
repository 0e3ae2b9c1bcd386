"""Write the tests' fixture of preferences: a model, its adapters, pairs, and what TRL says of them.

Needs torch, transformers, peft and trl; the tests need none. The reference of TRL is the model
without adapters, as jaxscale's is.

python experiments/preferences/trl_fixture.py
"""

import json
import shutil
from pathlib import Path

import datasets
import peft
import tokenizers
import torch
import transformers
import trl

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "rlhf" / "fixtures" / "trl"
SPECIAL = ["<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ANSWERS = ("Yes.", "No, never.", "Why?", "It is so, and always was.")
BETA = 0.5
NAMES = {  # of ours, theirs
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
}


def pair(number):
    """One of 24 pairs: a question, two answers of other lengths."""
    question = {"role": "user", "content": f"Is {number * 7 % 24} even?"}
    texts = ANSWERS[number % 4], ANSWERS[(number + number // 4 % 3 + 1) % 4]
    answers = ({"role": "assistant", "content": text} for text in texts)
    return dict(zip(("chosen", "rejected"), ([question, answer] for answer in answers)))


def write_tokenizer():
    """One token a character, and a chat template."""
    letters = sorted(set("".join(ANSWERS) + "Is even? 0123456789"))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    characters = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    characters.add_special_tokens(SPECIAL)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=SPECIAL[0], pad_token=SPECIAL[0]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(FOLDER)
    return tokenizer


def write_model(vocab_size):
    """A random model, and adapters that change it; returns the adapted one."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=128, eos_token_id=0, **sizes, **heads
    )
    transformers.LlamaForCausalLM(config).save_pretrained(FOLDER)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(read_model(), lora)
    for path, parameter in adapted.named_parameters():
        if "lora_" in path:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    adapted.save_pretrained(FOLDER / "adapters")
    (FOLDER / "adapters" / "README.md").unlink()
    return adapted.merge_and_unload()


def read_model():
    """The base, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def measured(model, tokenizer, pairs):
    """TRL's means over the pairs."""
    rows = [
        {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
        for chosen, rejected in (each.values() for each in pairs)
    ]
    data = datasets.Dataset.from_list(rows)
    options = dict(report_to=[], use_cpu=True, bf16=False, output_dir=str(FOLDER / "trainer"))
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=read_model(),
        args=trl.DPOConfig(beta=BETA, **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    found = trainer.evaluate()
    return {ours: found[f"eval_{theirs}"] for ours, theirs in NAMES.items()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer()
    model = write_model(len(tokenizer))
    pairs = [pair(number) for number in range(24)]
    (FOLDER / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    figures = measured(model, tokenizer, pairs)
    written = {"trl": trl.__version__, "beta": BETA, "figures": figures}
    (FOLDER / "trl.json").write_text(json.dumps(written, indent=1) + "\n")
    shutil.rmtree(FOLDER / "trainer", ignore_errors=True)
