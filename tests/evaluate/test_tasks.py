"""Files of tasks and the texts that are made of them."""

import json

import pytest

from jaxscale.evaluate.tasks import TaskPrompt, read_tasks
from jaxscale.types import InputError

TASK = {
    "instruction": "質問を入力とし、回答を出力してください。",
    "output_length": 15,
    "metrics": ["char_f1", "exact_match"],
    "few_shots": [
        {"input": "質問:赤い果物は?", "output": "りんご"},
        {"input": "質問:{output}は?", "output": "{input}"},
    ],
    "samples": [
        {"input": "質問:{instruction}?", "output": "YES"},
        {"input": "質問:二つ目?", "output": "NO"},
    ],
}


def write(path, **changes):
    path.write_text(json.dumps(TASK | changes))
    return path


def read(*paths, num_shots=0):
    return read_tasks("FewShotTasks.paths", tuple(map(str, paths)), num_shots)


def test_a_task_is_read_from_a_folder_in_the_order_of_names(tmp_path):
    write(tmp_path / "niilc.json", output_length=7)
    write(tmp_path / "jemhopqa.json")
    (tmp_path / "notes.txt").write_text("no task")
    one, other = read(tmp_path)
    assert (one.name, other.name, other.output_length) == ("jemhopqa", "niilc", 7)
    assert one.metrics == ("char_f1", "exact_match")
    assert one.samples[1] == ("質問:二つ目?", "NO")


def test_the_prompt_is_that_of_llm_jp_eval_and_braces_in_texts_stay(tmp_path):
    (task,) = read(write(tmp_path / "a.json"), num_shots=2)
    assert TaskPrompt().text(task, 2, task.samples[0].input) == (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
        "要求を適切に満たす応答を書きなさい。\n\n"
        "### 指示:\n質問を入力とし、回答を出力してください。\n\n"
        "### 入力:\n質問:赤い果物は?\n\n### 応答:\nりんご\n\n"
        "### 入力:\n質問:{output}は?\n\n### 応答:\n{input}\n\n"
        "### 入力:\n質問:{instruction}?\n\n### 応答:\n"
    )


def test_a_prompt_of_your_own_without_examples(tmp_path):
    (task,) = read(write(tmp_path / "a.json"))
    prompt = TaskPrompt(head="{instruction}", example=" Q: {input} A: {output}.")
    assert prompt.text(task, 0, "how {many}?") == TASK["instruction"] + " Q: how {many}? A: "


@pytest.mark.parametrize(
    "fields",
    [
        dict(example="{input}"),
        dict(example="{output}"),
        dict(example="{input} {output} {output}"),
        dict(example="A: {output} Q: {input}"),
        dict(example="{input} {output} {other}"),
        dict(head="{instrucion}"),
    ],
    ids=str,
)
def test_a_prompt_in_which_a_text_has_no_place_is_refused(fields):
    (name,) = fields
    with pytest.raises(InputError, match=f"TaskPrompt.{name}: "):
        TaskPrompt(**fields)


def test_metrics_that_are_not_known_are_left_out_beside_one_that_is(tmp_path, caplog):
    (task,) = read(write(tmp_path / "a.json", metrics=["comet_wmt22", "bleu_ja", ["x"]]))
    assert task.metrics == ("bleu_ja",)
    assert "metrics ['comet_wmt22', ['x']] left out; those known are exact_match, " in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(instruction=None), "instruction: given None, expected a value of type str"),
        (dict(output_length=0), "output_length: given 0, expected at least 1 token"),
        (dict(output_length=True), "output_length: given True, expected a value of type int"),
        (dict(metrics=[]), "metrics: given \\[\\], expected at least one of"),
        (dict(metrics=["comet"]), "metrics: given \\['comet'\\], expected at least one of"),
        (dict(metrics=[["comet"]]), "metrics: given \\[\\['comet'\\]\\], expected at least one"),
        (dict(samples=[{"input": "a", "output": "\ud800"}]), "samples\\[0\\]: output: given"),
        (dict(samples=[]), "samples: given \\[\\], expected at least one"),
        (dict(samples=["a"]), "samples\\[0\\]: given 'a', expected an object"),
        (
            dict(samples=[{"input": "a"}]),
            "samples\\[0\\]: output: given 'no such field'",
        ),
        (dict(metrics=["pearson"]), "samples\\[0\\].output: given 'YES', expected a number"),
        (dict(few_shots={}), "few_shots: given {}, expected a value of type list"),
    ],
    ids=str,
)
def test_a_file_that_is_no_task_is_refused_by_its_field(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"a.json: {message}"):
        read(write(tmp_path / "a.json", **changes))


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a.json: given .*, expected (JSON|a JSON object)"):
        read(tmp_path)


def test_too_few_worked_examples_are_refused(tmp_path):
    with pytest.raises(InputError, match="few_shots: given 2, expected at least num_shots = 3"):
        read(write(tmp_path / "a.json"), num_shots=3)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    for name in ("ja", "en"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.json")
    with pytest.raises(InputError, match="expected files of other names"):
        read(tmp_path)
