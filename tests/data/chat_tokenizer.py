"""A small tokenizer of Hugging Face with a chat template, written to a folder."""

import json
from pathlib import Path

import tokenizers

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "GENERATION{{ message['content'] + '<|end|>\n' }}END{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def as_messages(chat):
    return [{"role": role, "content": content} for role, content in chat]


def write_chat_tokenizer(path: Path) -> None:
    """A BPE of 300 tokens over bytes, whose template ends a chat with the end of a document."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Two and two? Four. So? Hi there", "<|system|>\n"], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    template = TEMPLATE.replace("GENERATION", "").replace("END", "")
    values = {"eos_token": SPECIAL[0], "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(values))
