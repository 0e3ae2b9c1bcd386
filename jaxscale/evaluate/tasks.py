"""Tasks in the format of llm-jp-eval: an instruction, some worked examples, questions."""

import dataclasses
import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxscale.data.files import find_files, read_bytes
from jaxscale.data.sources import check_characters
from jaxscale.evaluate.scores import SCORES, check_number
from jaxscale.types import InputError, check_types

logger = logging.getLogger(__name__)

PLACE = r"\{(\w+)\}"  # in a template


class Sample(NamedTuple):
    """A question and its right answer."""

    input: str
    output: str


@dataclasses.dataclass(frozen=True)
class Task:
    """What one file holds.

    Args:
        name: of the file, without its ending.
        label: of the file, for errors.
        instruction: what is to be done.
        output_length: most tokens of an answer.
        metrics: names among `SCORES`, of which the first one counts in averages.
        few_shots: worked examples.
        samples: what is asked.
    """

    name: str
    label: str
    instruction: str
    output_length: int
    metrics: tuple[str, ...]
    few_shots: tuple[Sample, ...]
    samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True)
class TaskPrompt:
    """How a task becomes a text, by default in the words of llm-jp-eval.

    Args:
        head: the beginning, with "{instruction}".
        example: what each worked example is, with "{input}" and "{output}"; a question is this up
            to "{output}".
    """

    head: str = (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
        "要求を適切に満たす応答を書きなさい。\n\n### 指示:\n{instruction}"
    )
    example: str = "\n\n### 入力:\n{input}\n\n### 応答:\n{output}"

    def __post_init__(self):
        check_types(self)
        if re.findall(PLACE, self.example) != ["input", "output"]:
            expected = "{input}, and {output} after it, each once"
            raise InputError("TaskPrompt.example", self.example, expected)
        if set(re.findall(PLACE, self.head)) - {"instruction"}:
            raise InputError("TaskPrompt.head", self.head, "no place but {instruction}")

    def text(self, task: Task, num_shots: int, question: str) -> str:
        """A question behind the instruction and the first worked examples."""
        pieces = [_filled(self.head, instruction=task.instruction)]
        for shot in task.few_shots[:num_shots]:
            pieces.append(_filled(self.example, input=shot.input, output=shot.output))
        asked, _ = self.example.split("{output}")
        pieces.append(_filled(asked, input=question))
        return "".join(pieces)


def _filled(template: str, **values: str) -> str:
    """The template with values in their places; braces in a value are text."""
    return re.sub(PLACE, lambda found: values[found[1]], template)


def read_tasks(parameter: str, paths: tuple[str, ...], num_shots: int) -> list[Task]:
    """The tasks of files, and of folders with files that end in .json, in the order of their names.

    Args:
        parameter: that gives the paths, for errors.
        paths: files and folders.
        num_shots: worked examples that each must have.
    Raises:
        InputError: a file is no such task; the error names its field.
    """
    files = [path for _, path in find_files(parameter, paths, ("*.json",))]
    tasks = sorted((_read_task(path) for path in files), key=lambda task: task.name)
    for task, after in itertools.pairwise(tasks):
        if task.name == after.name:
            raise InputError(parameter, f"{task.label} and {after.label}", "files of other names")
    for task in tasks:
        if len(task.few_shots) < num_shots:
            expected = f"at least num_shots = {num_shots} worked examples"
            raise InputError(f"{task.label}: few_shots", len(task.few_shots), expected)
    return tasks


def _read_task(path: Path) -> Task:
    label = str(path)
    try:
        values = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InputError(label, "its content", f"JSON ({error!r})") from None
    if not isinstance(values, dict):
        raise InputError(label, type(values).__name__, "a JSON object")
    task = Task(
        name=path.stem,
        label=label,
        instruction=_field(label, values, "instruction", str),
        output_length=_field(label, values, "output_length", int),
        metrics=_metrics(label, values),
        few_shots=_samples(label, values, "few_shots"),
        samples=_samples(label, values, "samples"),
    )
    _check(task)
    return task


def _check(task: Task) -> None:
    if task.output_length < 1:
        raise InputError(f"{task.label}: output_length", task.output_length, "at least 1 token")
    if not task.samples:
        raise InputError(f"{task.label}: samples", [], "at least one")
    for name in task.metrics:
        SCORES[name].check(f"{task.label}: metrics {name!r}")
    if any(SCORES[name].is_numeric for name in task.metrics):
        for number, sample in enumerate(task.samples):
            check_number(f"{task.label}: samples[{number}].output", sample.output)


def _metrics(label: str, values: dict[str, Any]) -> tuple[str, ...]:
    """Those that are known, at least one; the others are left out with a warning."""
    given = _field(label, values, "metrics", list)
    known = [name for name in given if isinstance(name, str) and name in SCORES]
    if not known:
        raise InputError(f"{label}: metrics", given, f"at least one of {tuple(SCORES)}")
    if len(known) < len(given):
        others = [name for name in given if name not in known]
        names = ", ".join(SCORES)
        logger.warning("%s: metrics %s left out; those known are %s", label, others, names)
    return tuple(known)


def _field(
    label: str,
    values: dict[str, Any],
    name: str,
    kind: type,
) -> Any:
    if name not in values:
        expected = f"one, beside {sorted(values)}"
        raise InputError(f"{label}: {name}", "no such field", expected)
    found = values[name]
    if not isinstance(found, kind) or isinstance(found, bool):
        raise InputError(f"{label}: {name}", found, f"a value of type {kind.__name__}")
    if kind is str:
        check_characters(f"{label}: {name}", found, found)
    return found


def _samples(
    label: str,
    values: dict[str, Any],
    name: str,
) -> tuple[Sample, ...]:
    found = []
    for number, each in enumerate(_field(label, values, name, list)):
        where = f"{label}: {name}[{number}]"
        if not isinstance(each, dict):
            raise InputError(where, each, "an object with input and output")
        texts = (_field(where, each, field, str) for field in Sample._fields)
        found.append(Sample(*texts))
    return tuple(found)
