"""Answers to tasks: a question's answer is the model's own, whatever is asked beside it."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import pytest

from jaxscale.data.tokenizer import TokenizerConfig, load_tokenizer
from jaxscale.data.tokenizer_kinds import ByteTokenizer
from jaxscale.evaluate.few_shot import FewShotTasks, scored
from jaxscale.evaluate.tasks import TaskPrompt, read_tasks
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.data.chat_tokenizer import write_chat_tokenizer
from tests.parallel.comparison import dense
from tests.serve.engines import one_device

MODEL = dense(num_layers=1, vocab_size=300, max_length=64)
PROMPT = TaskPrompt(head="{instruction}", example="\n{input}={output}")
QUESTIONS = ["1", "12", "123", "4", "45"]


@pytest.fixture(scope="module")
def context():
    params = init_params(parameter_table(MODEL), jax.random.key(0), "float32")
    engine = one_device(MODEL)
    return SimpleNamespace(params=params, step=3, model=MODEL, engine=lambda *_: engine)


def answer(context, tokens, num_tokens, end):
    """What the model continues one prompt with, alone."""
    (written,) = context.engine().write(
        context.params,
        [tokens],
        sampling=SamplingConfig(temperature=0.0),
        max_new_tokens=num_tokens,
        eos_id=end,
        num_tokens=257,
    )
    return ByteTokenizer().decode(written)


def write_task(folder, outputs, **changes):
    task = {
        "instruction": "add",
        "output_length": 5,
        "metrics": ["exact_match", "char_f1"],
        "few_shots": [{"input": "0", "output": "1"}],
        "samples": [
            {"input": question, "output": output}
            for question, output in zip(QUESTIONS, outputs, strict=True)
        ],
    }
    (folder / "sums.json").write_text(json.dumps(task | changes))


def make(folder, **changes):
    fields = dict(
        paths=(str(folder),),
        tokenizer=TokenizerConfig(),
        num_shots=1,
        prompt=PROMPT,
        batch_size=2,
    )
    return FewShotTasks(**fields | changes)


def test_answers_are_the_models_own_and_scores_are_of_them(tmp_path, context):
    """Batches of two, the last one filled up; the first and third right answers are the model's."""
    prompts = [list(f"add\n0=1\n{question}=".encode()) for question in QUESTIONS]
    wanted = [answer(context, prompt, 5, ByteTokenizer.eos_id) for prompt in prompts]
    outputs = [wanted[0], "other", wanted[2], "?", "!"]
    write_task(tmp_path, outputs)
    tasks = make(tmp_path, answers=str(tmp_path / "answers"))
    tasks.check(context)
    figures = tasks(context)
    assert figures["sums/exact_match"] == pytest.approx(2 / 5)
    assert figures["average"] == figures["sums/exact_match"]
    assert 2 / 5 <= figures["sums/char_f1"] < 1
    lines = (tmp_path / "answers/sums_3.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["answer"] for record in records] == wanted
    assert [record["output"] for record in records] == outputs
    assert [record["input"] for record in records] == QUESTIONS


def test_the_first_questions_alone_are_asked(tmp_path, context):
    outputs = [answer(context, list(b"add\n1="), 5, ByteTokenizer.eos_id), *"abcd"]
    write_task(tmp_path, outputs)
    figures = make(tmp_path, num_shots=0, max_samples=1)(context)
    assert figures["sums/exact_match"] == 1


def test_a_chat_model_is_asked_as_its_template_has_it(tmp_path, context, monkeypatch):
    """A text of the tokenizer's between the special tokens of a user's message; `end` ends it."""
    write_chat_tokenizer(tmp_path)
    tokenizer = load_tokenizer(TokenizerConfig("huggingface", str(tmp_path)))
    special = tokenizer.special_tokens
    asked = []

    def write(self, params, prompts, **settings):
        assert settings["eos_id"] == special["<|end|>"]
        asked.extend(prompts)
        return [[*tokenizer.encode("Four."), special["<|end|>"]] for _ in prompts]

    monkeypatch.setattr(HybridEngine, "write", write)
    (tmp_path / "tasks").mkdir()
    write_task(tmp_path / "tasks", ["Four.", *"bcde"])
    tasks = make(
        tmp_path / "tasks",
        tokenizer=TokenizerConfig("huggingface", str(tmp_path)),
        chat=str(tmp_path),
        end="<|end|>",
    )
    tasks.check(context)
    assert tasks(context)["sums/exact_match"] == pytest.approx(1 / 5)
    text = tokenizer.encode_part("\nadd\n0=1\n1=")
    first = [special["<|user|>"], *text, special["<|end|>"]]
    assert asked[0][: len(first)] == first
    assert asked[0][len(first) :].count(special["<|assistant|>"]) == 1


def test_a_right_answer_may_have_empty_lines_and_an_answer_ends_at_its_first(tmp_path):
    write_task(tmp_path, ["a\n\nb", "a", "ＡＢ", "", "x"])
    (task,) = read_tasks("paths", (str(tmp_path),), 0)
    answers = ["a", "a\n\n### next", "AB", "\n\n", "y"]
    assert scored(task, answers)["exact_match"] == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_shots=-1), "FewShotTasks.num_shots: given -1"),
        (dict(max_samples=0), "FewShotTasks.max_samples: given 0"),
        (dict(batch_size=0), "FewShotTasks.batch_size: given 0"),
        (dict(tensor=0), "FewShotTasks.tensor: given 0"),
        (dict(end="<|end|>"), "FewShotTasks.end: given '<|end|>'"),
        (dict(paths=("nowhere",)), "FewShotTasks.paths: given 'nowhere'"),
        (dict(num_shots=2), "sums.json: few_shots: given 1, expected at least num_shots = 2"),
        (
            dict(prompt=TaskPrompt("x" * 60, "{input}{output}")),
            "sums.json: samples[0]: given '63 t",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_before_a_run_begins(tmp_path, context, changes, message):
    write_task(tmp_path, "abcde")
    with pytest.raises(InputError, match=re.escape(message)):
        make(tmp_path, **changes).check(context)


@pytest.mark.parametrize("answers", ["{}/file/answers", "/proc", "a\0b", "~nosuchuser/x"])
def test_answers_that_cannot_be_written_are_refused_before_a_run_begins(tmp_path, context, answers):
    write_task(tmp_path, "abcde")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"FewShotTasks.answers: given .*a folder that can be"):
        make(tmp_path, answers=answers.format(tmp_path)).check(context)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "sums.json"}


def test_a_model_without_words_is_refused_before_a_run_begins(tmp_path, context):
    write_task(tmp_path, "abcde")
    model = dataclasses.replace(MODEL, use_value_head=True)
    with pytest.raises(InputError, match=r"ModelConfig\.use_value_head: given True"):
        make(tmp_path).check(SimpleNamespace(model=model, engine=context.engine))
