"""A sequence of a request with its text, as the engine keeps it."""

import dataclasses

import numpy as np

from jaxscale.serve.grammar import Matcher
from jaxscale.serve.requests import Delta, RequestConfig, TokenLogprobs
from jaxscale.serve.sequences import Piece, Sequence
from jaxscale.serve.text import TextStream


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
    """

    request: int
    index: int
    config: RequestConfig
    sequence: Sequence
    text: TextStream | None
    matcher: Matcher | None = None
    weights_version: int = 0

    def mask(self, piece: Piece) -> np.ndarray | None:
        """What its grammar allows behind a piece."""
        return self.matcher.mask() if self.matcher and piece.is_drawing else None

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
        )


def logprobs_of(
    arrays: tuple[np.ndarray, ...] | None,
    place: tuple[int, int],
    count: int | None,
) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of the token of a step and a row, as far as they are asked for."""
    if count is None or arrays is None:
        return ()
    drawn, top, tokens = arrays
    pairs = zip(tokens[place][:count].tolist(), top[place][:count].tolist(), strict=True)
    return (TokenLogprobs(float(drawn[place]), tuple(pairs)),)
