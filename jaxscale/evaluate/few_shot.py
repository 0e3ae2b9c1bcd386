"""An evaluator that answers tasks and scores the answers, as llm-jp-eval does."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxscale.data.tokenizer import TokenizerConfig, check_vocabulary, load_tokenizer
from jaxscale.data.tokenizer_kinds import Tokenizer, ending_token
from jaxscale.evaluate.scores import SCORES, first_part, normalised
from jaxscale.evaluate.tasks import Sample, Task, TaskPrompt, read_tasks
from jaxscale.models.evaluation import EvaluationContext
from jaxscale.serve.decoding import check_prompts
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError, Params, check_not_negative, check_positive, check_types

GREEDY = SamplingConfig(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class FewShotTasks:
    """Evaluator that answers questions behind worked examples, and scores the answers.

    A file is a task in the format of llm-jp-eval: an object with `instruction`, `output_length` (of
    an answer, in tokens), `metrics`, and `few_shots` and `samples`, lists of `input` and `output`.
    Metrics that are not known are left out, where another one is known. The most likely token is
    taken at each place. An answer ends at the first empty line. Answers and right answers are
    compared in Unicode's form NFKC.

    Source: LLM-jp 2024 (arXiv 2407.03963), section 5.1.
    Args:
        paths: files, and folders of files that end in .json.
        tokenizer: as the run's.
        num_shots: worked examples before each question.
        max_samples: questions of each task, the first ones.
        prompt: how a task becomes a text.
        chat: folder of Hugging Face with a chat template, by which that text is a user's message;
            None continues the text.
        end: text of the special token that ends an answer; None for the one that ends a document.
        answers: folder for the answers to each task, TASK_STEP.jsonl, another one for each
            evaluator; None writes none.
        batch_size: questions at a time; more are faster and take more memory.
        tensor: devices over which each copy of the model is spread while it writes.
    Cost: one copy of the parameters for every `tensor` devices while answers are written.
    """

    paths: tuple[str, ...]
    tokenizer: TokenizerConfig
    num_shots: int = 4
    max_samples: int = 100
    prompt: TaskPrompt = TaskPrompt()
    chat: str | None = None
    end: str | None = None
    answers: str | None = None
    batch_size: int = 16
    tensor: int = 1

    def __post_init__(self):
        check_types(self)
        check_not_negative("FewShotTasks.num_shots", self.num_shots)
        check_positive("FewShotTasks.max_samples", self.max_samples)
        check_positive("FewShotTasks.batch_size", self.batch_size)
        check_positive("FewShotTasks.tensor", self.tensor)

    def check(self, context: EvaluationContext) -> None:
        """Reads the tasks.

        Raises:
            InputError: a file is no such task, a score's library is missing, a prompt is too long
                for the model, the devices cannot hold the model, or answers cannot be written.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        check_vocabulary(tokenizer, context.model.vocab_size)
        ending_token(tokenizer, self.end, "FewShotTasks.end")
        for task, prompts in self._tasks:
            check_prompts(prompts, context.model, task.output_length, f"{task.label}: samples")
        context.engine("FewShotTasks.tensor", self.tensor).check_room("FewShotTasks")
        if self.answers is not None and jax.process_index() == 0:
            _write(self.answers, ".probe", "").unlink()

    def __call__(self, context: EvaluationContext) -> dict[str, float]:
        """The scores of each task, "task/metric", and "average", the mean of their first ones."""
        engine = context.engine("FewShotTasks.tensor", self.tensor)
        params = engine.spread(context.params)
        figures, first = {}, []
        for task, prompts in self._tasks:
            answers = self._answered(task, prompts, engine, params)
            if self.answers is not None and jax.process_index() == 0:
                name = f"{task.name}_{context.step}.jsonl"
                _write(self.answers, name, self._records(task, answers))
            scores = scored(task, answers)
            first.append(next(iter(scores.values())))
            figures |= {f"{task.name}/{metric}": value for metric, value in scores.items()}
        return {**figures, "average": sum(first) / len(first)}

    @functools.cached_property  # read once for all of a run's evaluations
    def _tasks(self) -> list[tuple[Task, list[list[int]]]]:
        """Each task with the tokens of its prompts."""
        tokenizer = load_tokenizer(self.tokenizer)
        tasks = read_tasks("FewShotTasks.paths", self.paths, self.num_shots)
        return [(task, self._prompts(task, tokenizer)) for task in tasks]

    def _asked(self, task: Task) -> Sequence[Sample]:
        return task.samples[: self.max_samples]

    def _prompts(self, task: Task, tokenizer: Tokenizer) -> list[list[int]]:
        texts = [
            self.prompt.text(task, self.num_shots, sample.input) for sample in self._asked(task)
        ]
        if self.chat is None:
            return [tokenizer.encode(text) for text in texts]
        # It needs jinja, which texts that are continued do without.
        from jaxscale.data.chat_template import read_chat_template

        template = read_chat_template(Path(self.chat).expanduser())
        return [template.encode([{"role": "user", "content": text}], tokenizer) for text in texts]

    def _answered(
        self,
        task: Task,
        prompts: Sequence[list[int]],
        engine: HybridEngine,
        params: Params,
    ) -> list[str]:
        """What the model writes to each question."""
        tokenizer = load_tokenizer(self.tokenizer)
        end = ending_token(tokenizer, self.end, "FewShotTasks.end")
        # Prompts of about the same length share a batch, for all are padded to the longest.
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            # The last batch is filled up, so that it needs no compilation of its own.
            rows = [*numbers, *numbers[-1:] * (self.batch_size - len(numbers))]
            written = engine.write(
                params,
                [prompts[number] for number in rows],
                sampling=GREEDY,
                max_new_tokens=task.output_length,
                eos_id=end,
                num_tokens=tokenizer.vocab_size,
            )
            for number, tokens in zip(numbers, written):
                text = tokenizer.decode([token for token in tokens if token != end])
                answers[number] = text
        return answers

    def _records(self, task: Task, answers: Sequence[str]) -> str:
        """A line of JSON for each question."""
        pairs = zip(self._asked(task), answers, strict=True)
        records = [{**sample._asdict(), "answer": answer} for sample, answer in pairs]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        return "\n".join([*lines, ""])


def _write(folder: str, name: str, text: str) -> Path:
    """Writes a file to a folder, which is made if need be; returns its path."""
    try:
        path = Path(folder).expanduser() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in it; no such user's home
        expected = f"a folder that can be written ({error})"
        raise InputError("FewShotTasks.answers", folder, expected) from error
    return path


def scored(
    task: Task,
    answers: Sequence[str],
) -> dict[str, float]:
    """The scores of answers to a task's first questions, by the names of its metrics."""
    right = [normalised(sample.output) for sample in task.samples[: len(answers)]]
    compared = [normalised(first_part(answer)) for answer in answers]
    return {metric: SCORES[metric].of(compared, right) for metric in task.metrics}
