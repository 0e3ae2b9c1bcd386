"""What is asked of the engine, and what it answers."""

import dataclasses
import functools
from typing import NamedTuple

from jaxscale.serve.grammar import GrammarConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.serve.sequences import FinishReason
from jaxscale.types import InputError, check_not_negative, check_positive, check_types

MAX_PENALTY = 1e6  # however often it is taken off, float32 holds the rest
# What logits are multiplied and divided by; beyond, a text would be nothing but the penalty.
MIN_REPETITION, MAX_REPETITION = 0.01, 100.0
MAX_LOGPROBS = 20  # the most probable tokens that are reported beside a drawn one


@dataclasses.dataclass(frozen=True)
class Penalties:
    """What is taken from the logits of tokens that were there before.

    Source: Keskar et al. 2019, CTRL (arXiv 1909.05858), section 4.1, for `repetition`; OpenAI's API
        reference for the other two.
    Args:
        repetition: divides the positive logits of tokens of the prompt and of the output, and
            multiplies the negative ones; 1 changes nothing. From 0.01 to 100.
        presence: taken off once for a token of the output; from -1e6 to 1e6.
        frequency: taken off as often as the output holds the token; likewise.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self):
        check_types(self)
        if not MIN_REPETITION <= self.repetition <= MAX_REPETITION:
            expected = f"{MIN_REPETITION} to {MAX_REPETITION}"
            raise InputError("Penalties.repetition", self.repetition, expected)
        for name in ("presence", "frequency"):
            given = getattr(self, name)
            if not -MAX_PENALTY <= given <= MAX_PENALTY:
                expected = f"{-MAX_PENALTY:g} to {MAX_PENALTY:g}"
                raise InputError(f"Penalties.{name}", given, expected)


NO_PENALTIES = Penalties()


@dataclasses.dataclass(frozen=True)
class RequestConfig:
    """How one prompt is to be continued.

    Args:
        sampling: how tokens are drawn; a sequence draws the same from its seed in any batch.
        max_new_tokens: longest continuation.
        num_sequences: continuations of the prompt, which draw apart.
        stop: texts before which a continuation ends.
        stop_ids: tokens at which it ends, beside the tokenizer's end token.
        spelt: special tokens that the text spells, such as those that begin a call of a tool.
        ignore_eos: whether it goes on behind the tokenizer's end token.
        penalties: on what was there before.
        num_logprobs: how many of the most probable tokens are reported with their log-probability
            beside the one drawn; None reports nothing. They are the model's own, before
            temperature, filters and penalties.
        num_prompt_logprobs: likewise of each token of the prompt but the first.
        grammar: that the continuation has to follow; it needs a tokenizer.
        adapter: by its name, of those that the engine has; None for the model alone.
        priority: higher ones come first.
        timeout_s: after which the request is ended; None for never.
    """

    sampling: SamplingConfig = SamplingConfig()
    max_new_tokens: int = 100
    num_sequences: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    spelt: tuple[str, ...] = ()
    ignore_eos: bool = False
    penalties: Penalties = NO_PENALTIES
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: GrammarConfig | None = None
    adapter: str | None = None
    priority: int = 0
    timeout_s: float | None = None

    def __post_init__(self):
        check_types(self)
        check_positive("max_new_tokens", self.max_new_tokens)
        check_positive("num_sequences", self.num_sequences)
        if "" in self.stop:
            raise InputError("stop", self.stop, "texts of at least one character")
        for name in ("num_logprobs", "num_prompt_logprobs"):
            num = getattr(self, name)
            if num is not None and not 0 <= num <= MAX_LOGPROBS:
                raise InputError(name, num, f"0 <= {name} <= {MAX_LOGPROBS}, or None")
        if self.timeout_s is not None:
            check_not_negative("timeout_s", self.timeout_s)

    @property
    def is_penalised(self) -> bool:
        """Whether penalties change its logits."""
        # Most have the default itself, which is told sooner than that another one is equal.
        return self.penalties is not NO_PENALTIES and self.penalties != NO_PENALTIES

    @functools.cached_property
    def draws_with(self) -> tuple[bool, bool, bool]:
        """Whether it draws with noise, with noise and filters, and with log-probabilities."""
        sampling = self.sampling
        has_noise = sampling.temperature > 0
        has_filters = sampling.top_k is not None or sampling.top_p < 1 or sampling.min_p > 0
        return has_noise, has_noise and has_filters, self.num_logprobs is not None


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place.

    Args:
        drawn: of the token drawn.
        top: (token, log-probability) of the most probable ones, in descending order.
    """

    drawn: float
    top: tuple[tuple[int, float], ...]


class Delta(NamedTuple):
    """What is new of one sequence after a step.

    Args:
        request: number of the request.
        index: which of its sequences.
        text: new text; what may yet become a stop text, or a character in the making, is held back.
        tokens: the new tokens.
        logprobs: of each new token; none where they are not asked for.
        finish_reason: on the last delta of a sequence, else None.
        weights_version: of the weights that drew the tokens.
        num_cached: prompt tokens that a cached prefix has spared.
        prompt_logprobs: of each prompt token but the first, on the first delta with tokens; none
            where they are not asked for.
        waited_s: seconds from its arrival to its first step.
    """

    request: int
    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    weights_version: int
    num_cached: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    waited_s: float = 0.0


@dataclasses.dataclass
class Completion:
    """One continuation as a whole; arguments as `Delta`."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    weights_version: int = 0
    num_cached: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def add(self, delta: Delta) -> None:
        """Appends what is new."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.weights_version = delta.weights_version
        self.num_cached = delta.num_cached
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
