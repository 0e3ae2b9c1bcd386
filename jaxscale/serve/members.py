"""A sequence of a request with its text, as the engine keeps it."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxscale.serve.grammar import Matcher
from jaxscale.serve.requests import Delta, RequestConfig, TokenLogprobs
from jaxscale.serve.sequences import Piece, Sequence
from jaxscale.serve.text import TextStream


class Score(NamedTuple):
    """What is known of a token's log-probability.

    Args:
        drawn: its own.
        top: [MAX_LOGPROBS] of the most probable tokens, descending.
        tokens: [MAX_LOGPROBS] which these are.
    """

    drawn: float
    top: np.ndarray
    tokens: np.ndarray

    @classmethod
    def at(cls, arrays: tuple[np.ndarray, ...], place: tuple[int, int]) -> "Score":
        """That of a step and a row, of a launch's log-probabilities."""
        drawn, top, tokens = arrays
        return cls(float(drawn[place]), top[place].copy(), tokens[place].copy())

    def logprobs(self, count: int) -> TokenLogprobs:
        """With the `count` most probable tokens."""
        pairs = zip(self.tokens[:count].tolist(), self.top[:count].tolist(), strict=True)
        return TokenLogprobs(self.drawn, tuple(pairs))


@dataclasses.dataclass(eq=False)
class Member:
    """A sequence of a request: what the scheduler knows of it, and its text.

    Args:
        request: number of the request.
        index: which of its sequences.
        config: of the request.
        sequence: as the scheduler knows it.
        text: None for an engine without texts.
        matcher: of its grammar.
        weights_version: of the weights that drew its last token.
        is_prompt_told: whether the log-probabilities of its prompt have been handed out.
        added_s: when it arrived, on the engine's clock.
        waited_s: seconds from then to its first step.
    """

    request: int
    index: int
    config: RequestConfig
    sequence: Sequence
    text: TextStream | None
    matcher: Matcher | None = None
    weights_version: int = 0
    is_prompt_told: bool = False
    added_s: float = 0.0
    waited_s: float = 0.0

    def masks(self, piece: Piece) -> list[np.ndarray] | None:
        """What its grammar allows behind a piece and its drafts; None for all tokens."""
        if self.matcher is None or not piece.is_drawing:
            return None
        return self.matcher.masks(piece.drafts)

    def score(self, piece: Piece, found: list[Score]) -> None:
        """Takes what is known behind the tokens of a piece of the prompt."""
        scores, prompt = self.sequence.scores, self.sequence.prompt
        for position, score in enumerate(found, piece.start + 1):
            if position == len(scores) < len(prompt):
                scores.append(score)

    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Of each prompt token but the first, as many as are asked for, the first time."""
        is_first = self.sequence.scores is not None and not self.is_prompt_told
        if not is_first or self.sequence.is_scoring:
            return ()
        self.is_prompt_told = True
        count = self.config.num_prompt_logprobs
        return tuple(score.logprobs(count) for score in self.sequence.scores[1:])

    def delta(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
    ) -> Delta:
        """What is new of the sequence."""
        return Delta(
            request=self.request,
            index=self.index,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            finish_reason=self.sequence.finish_reason,
            weights_version=self.weights_version,
            num_cached=self.sequence.num_cached or 0,
            prompt_logprobs=self.prompt_logprobs() if tokens else (),
            waited_s=self.waited_s,
        )
