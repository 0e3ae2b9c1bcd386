"""What an answer is worth by a rule; a reward of your own is a function with the same arguments."""

from jaxscale.data.prompts import Prompt
from jaxscale.types import InputError


def exact_match(prompt: Prompt, answer: str) -> float:
    """1 if the answer is the text in the line's field `answer`, blanks around both aside, else 0.

    Raises:
        InputError: the line has no such text.
    """
    right = prompt.line.get("answer")
    if not isinstance(right, str):
        raise InputError(prompt.key, right, "a field `answer` with a text for exact_match")
    return float(answer.strip() == right.strip())
