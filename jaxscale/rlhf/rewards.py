"""What answers are worth by a rule; a reward of your own is a function with the same arguments."""

from collections.abc import Sequence

from jaxscale.data.prompts import Prompt
from jaxscale.rlhf.rollouts import Answer
from jaxscale.types import InputError


def exact_match(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
    """1 for the text in the field `answer` of a prompt's line, blanks around both aside, else 0.

    Args:
        prompts: the prompts.
        answers: the answer to each.
    Raises:
        InputError: a line has no such text.
    """
    pairs = zip(prompts, answers, strict=True)
    return [float(_right(prompt) == answer.text.strip()) for prompt, answer in pairs]


def _right(prompt: Prompt) -> str:
    right = prompt.line.get("answer")
    if not isinstance(right, str):
        raise InputError(prompt.key, right, "a field `answer` with a text for exact_match")
    return right.strip()
