"""What answers are worth by a rule; a reward of your own is called with the same arguments."""

import dataclasses
from collections.abc import Sequence

from jaxscale.data.prompts import Prompt
from jaxscale.data.tokenizer_kinds import Tokenizer
from jaxscale.rlhf.rollouts import Answer
from jaxscale.types import InputError, check_types


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """A reward of 1 for the text that a prompt's line has, blanks around both aside, else 0.

    Args:
        field: of the line, with the right answer's text.
    """

    field: str = "answer"

    def __post_init__(self):
        check_types(self)

    def check(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> None:
        """Raises InputError if a prompt's line has no such text."""
        for prompt in prompts:
            right = prompt.line.get(self.field)
            if not isinstance(right, str):
                expected = f"a field {self.field!r} with a text for ExactMatch"
                raise InputError(prompt.key, right, expected)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        """The reward of the answer to each prompt."""
        pairs = zip(prompts, answers, strict=True)
        return [
            float(prompt.line[self.field].strip() == answer.text.strip())
            for prompt, answer in pairs
        ]
