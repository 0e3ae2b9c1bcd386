"""Write answers about numbers, and a tokenizer: what reward_cpu.gin and ppo.gin learn from.

The better answer of a pair says rightly whether a number is even. Its form says nothing. Chats have
one answer each, of which a quarter are wrong, and questions the right one beside them. A task in
the format of llm-jp-eval asks about other numbers, for tasks.gin.

python experiments/preferences/parity.py runs/parity
"""

import json
import sys
from pathlib import Path

import tokenizers

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
SIZE = 1000  # numbers
LETTERS = "0123456789 abcdefghijklmnopqrstuvwxyz?.,"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(number, answer):
    """A question and an answer to it."""
    return [
        {"role": "user", "content": f"is {number} even or odd?"},
        {"role": "assistant", "content": answer},
    ]


def words(number):
    """The right word about a number, and the wrong one."""
    return ("even", "odd") if number % 2 == 0 else ("odd", "even")


def pairs():
    """A right and a wrong answer about each number, each in one of three forms."""
    forms = "{}.", "it is {}.", "{1} is {0}, of course."
    for number in range(SIZE):
        right, wrong = words(number)
        chosen = forms[number // 2 % 3].format(right, number)
        rejected = forms[number // 6 % 3].format(wrong, number)
        yield {"chosen": chat(number, chosen), "rejected": chat(number, rejected)}


def chats():
    """Four answers about each number, of which one is wrong."""
    for number in range(SIZE):
        right, wrong = words(number)
        for word in (right, right, right, wrong):
            yield {"messages": chat(number, f"it is {word}.")}


def questions():
    """A question about each number, and the right answer as a field beside it."""
    for number in range(SIZE):
        question, answer = chat(number, f"it is {words(number)[0]}.")
        yield {"messages": [question], "answer": answer["content"]}


def task():
    """Questions about the numbers that come next, with the right answers."""
    samples = [chat(number, f"it is {words(number)[0]}.") for number in range(SIZE, SIZE + 100)]
    return {
        "instruction": "Say whether a number is even.",
        "output_length": 32,
        "metrics": ["exact_match", "char_f1"],
        "few_shots": [],
        "samples": [{"input": ask["content"], "output": say["content"]} for ask, say in samples],
    }


def write_lines(file, lines):
    """One JSON object a line."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write(folder):
    """The tokenizer has one token a character."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    write_lines(folder / "pairs.jsonl", pairs())
    write_lines(folder / "chats.jsonl", chats())
    write_lines(folder / "questions.jsonl", questions())
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "parity.json").write_text(json.dumps(task()))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
