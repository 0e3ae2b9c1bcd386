"""Answers that a model writes to prompts while it is trained, and what each is worth."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxscale.data.loader import DataConfig
from jaxscale.data.prompt_loader import PromptLoader
from jaxscale.data.prompts import Prompt
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.data.tokenizer_kinds import Tokenizer, ending_token
from jaxscale.models.evaluation import EvaluationContext
from jaxscale.serve.decoding import check_prompts
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import Batch, InputError, Params, check_built, check_positive, check_types

Reward = Callable[[Sequence[Prompt], Sequence["Answer"]], Sequence[float]]
TENSOR = "RolloutConfig.tensor"  # for errors
SMALLEST_DEVIATION = 1e-6  # of rewards; what is less is rounding


class Answer(NamedTuple):
    """What a model wrote.

    Args:
        tokens: with the one that ended it, unless it was cut off.
        text: without that one.
    """

    tokens: list[int]
    text: str


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What a model that learns from rewards writes in each step.

    Args:
        rewards: name -> (prompts, the answer to each) -> numbers; their sum is an answer's reward.
            One that also has `check(tokenizer, prompts, max_new_tokens)` is asked before anything
            is written, and raises InputError if it could not reward answers to them.
        num_answers: to each prompt; `policy_loss` compares an answer with the others.
        max_new_tokens: longest answer.
        end: text of the special token that ends an answer; None for the one that ends a document.
        tensor: devices over which each copy of the model is spread while it writes. All devices of
            the mesh write, each group of so many its share of the answers.
    """

    rewards: dict[str, Reward]
    num_answers: int = 8
    max_new_tokens: int = 128
    end: str | None = None
    tensor: int = 1

    def __post_init__(self):
        check_types(self)
        check_positive("RolloutConfig.max_new_tokens", self.max_new_tokens)
        check_positive("RolloutConfig.num_answers", self.num_answers)
        check_positive("RolloutConfig.tensor", self.tensor)
        if not self.rewards:
            raise InputError("RolloutConfig.rewards", self.rewards, "at least one reward")

    def check(self, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
        """Raises InputError if there is no such end, or a reward's own `check` does."""
        self.end_id(tokenizer)
        for name, reward in self.rewards.items():
            check_built(f"RolloutConfig.rewards[{name!r}]", reward)
            if hasattr(reward, "check"):
                reward.check(tokenizer, prompts, self.max_new_tokens)

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The token that ends an answer; raises InputError if the tokenizer has none such."""
        return ending_token(tokenizer, self.end, "RolloutConfig.end")


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Writes answers on all devices, and rewards them.

    They are drawn at temperature 1 from all tokens that the tokenizer knows, so that their
    probability is the one that the loss takes, but for what a model with more rows gives to those
    that stand for no token, and of an answer that outgrows LongRoPE's original length the tokens
    before that.

    Args:
        config: how many and how long.
        engine: of the model.
        tokenizer: as the run's.
        length: T, tokens of a row.
        seed: of the draws.
    """

    config: RolloutConfig
    engine: HybridEngine
    tokenizer: Tokenizer
    length: int
    seed: int

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        draws: np.ndarray,
    ) -> tuple[Batch, np.ndarray, dict[str, float]]:
        """Answers to each prompt, as rows to learn from.

        Args:
            params: of the training.
            prompts: P of them.
            draws: [P] a number for each, from which what is drawn derives.
        Returns:
            ({tokens, labels, weights, segments, positions} [P * num_answers, T], answers to one
            prompt next to each other; the reward of each answer, [P, num_answers]; figures: means
            of each reward and of their sum, "reward", with its deviation among several answers to a
            prompt, of an answer's tokens, the share of answers that were cut off, and the seconds
            in which parameters were spread and answers written and rewarded).
        """
        jax.block_until_ready(params)  # the step before may not be over, and is no part of this
        began = time.perf_counter()
        params = jax.block_until_ready(self.engine.spread(params))
        num, spread = self.config.num_answers, time.perf_counter()
        asked = [prompt for prompt in prompts for _ in range(num)]
        sequences = (draws[:, None] * num + np.arange(num)).reshape(-1)
        end = self.config.end_id(self.tokenizer)
        written = self.engine.write(
            params,
            [prompt.tokens for prompt in asked],
            sampling=SamplingConfig(seed=self.seed),
            max_new_tokens=self.config.max_new_tokens,
            eos_id=end,
            sequences=sequences.tolist(),
            num_tokens=self.tokenizer.vocab_size,
        )
        answers = [self._answer(tokens, end) for tokens in written]
        rewards = {
            name: _checked(name, reward(asked, answers), asked, answers)
            for name, reward in self.config.rewards.items()
        }
        total = sum(rewards.values()).reshape(-1, num)
        figures = {f"reward/{name}": float(of_each.mean()) for name, of_each in rewards.items()}
        figures |= {
            "reward": float(total.mean()),
            "answer_tokens": float(np.mean([len(tokens) for tokens in written])),
            "cut_off": float(np.mean([end not in tokens for tokens in written])),
            "spread_s": spread - began,
            "rollout_s": time.perf_counter() - spread,
        }
        if num > 1:
            figures["reward_deviation"] = float(total.std(1).mean())
        return self._rows(asked, written), total, figures

    def _answer(self, tokens: list[int], end: int) -> Answer:
        text = self.tokenizer.decode([token for token in tokens if token != end])
        return Answer(tokens, text)

    def _rows(
        self,
        asked: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
    ) -> Batch:
        shape = (len(asked), self.length)
        names = ("tokens", "labels", "segments")
        batch: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in names}
        batch["positions"] = np.tile(np.arange(self.length, dtype=np.int32), (len(asked), 1))
        batch["weights"] = np.zeros(shape, np.float32)
        for row, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            text = [*prompt.tokens, *answer]
            size, first = len(text) - 1, len(prompt.tokens) - 1
            batch["tokens"][row, :size] = text[:-1]
            batch["labels"][row, :size] = text[1:]
            batch["weights"][row, first:size] = 1
            # Padding is no part of the text, whose length decides its positions in LongRoPE.
            batch["segments"][row, :size] = 1
        return batch


def advantages(rewards: np.ndarray) -> np.ndarray:
    """How many deviations an answer is better than the mean of the answers to its prompt.

    Source: Shao et al. 2024, GRPO (arXiv 2402.03300), section 4.1.2.
    Args:
        rewards: [P, answers to each].
    Returns:
        The same shape; 0 where all answers to a prompt are worth the same.
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    deviation = rewards.std(1, keepdims=True)
    is_equal = deviation < SMALLEST_DEVIATION
    return np.where(is_equal, 0, centred / np.where(is_equal, 1, deviation))


def _checked(
    name: str,
    rewards: Sequence[float],
    asked: Sequence[Prompt],
    answers: Sequence[Answer],
) -> np.ndarray:
    parameter = f"RolloutConfig.rewards[{name!r}]"
    try:
        found = np.asarray(rewards, float)
    except (TypeError, ValueError) as error:
        expected = f"numbers ({error})"
        raise InputError(parameter, type(rewards).__name__, expected) from error
    if found.shape != (len(asked),):
        expected = f"a number for each of {len(asked)} answers"
        raise InputError(parameter, f"an array of shape {found.shape}", expected)
    for reward, prompt, answer in zip(found, asked, answers, strict=True):
        if not np.isfinite(reward):
            given = f"{reward} for {answer.text!r}, an answer to {prompt.key}"
            raise InputError(parameter, given, "a finite number")
    return found


@dataclasses.dataclass(frozen=True)
class HeldOutRewards:
    """Evaluator that answers held-out prompts as the training does, and rewards the answers.

    Args:
        data: as the run's.
        rollouts: as the run's, or with other rewards.
        num_prompts: at most.
        seed: of the draws, the same at each evaluation.
    Cost: one copy of the parameters for every `RolloutConfig.tensor` devices while answers are
        written.
    """

    data: DataConfig
    rollouts: RolloutConfig
    num_prompts: int = 32
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_positive("HeldOutRewards.num_prompts", self.num_prompts)
        if self.data.held_out_fraction == 0:
            expected = "above 0: no prompt is held out to be answered"
            raise InputError("DataConfig.held_out_fraction", 0, expected)

    def check(self, context: EvaluationContext) -> None:
        """Raises InputError if no prompt is held out, one is too long, or a reward refuses.

        So it does if the devices cannot hold the model once for every `RolloutConfig.tensor`.
        """
        self.rollouts.check(load_tokenizer(self.data.tokenizer), self._prompts)
        tokens = [prompt.tokens for prompt in self._prompts]
        check_prompts(tokens, context.model, self.rollouts.max_new_tokens)
        context.engine(TENSOR, self.rollouts.tensor).check_room("HeldOutRewards")

    def __call__(self, context: EvaluationContext) -> dict[str, float]:
        """The figures of `Rollouts`."""
        rollouts = Rollouts(
            self.rollouts,
            engine=context.engine(TENSOR, self.rollouts.tensor),
            tokenizer=load_tokenizer(self.data.tokenizer),
            length=self.data.sequence_length,
            seed=self.seed,
        )
        draws = np.arange(len(self._prompts))
        *_, figures = rollouts(context.params, self._prompts, draws)
        return figures

    @functools.cached_property  # read once for all of a run's evaluations
    def _prompts(self) -> list[Prompt]:
        num_answers, num_tokens = self.rollouts.num_answers, self.rollouts.max_new_tokens
        loader = PromptLoader(self.data, num_answers, num_tokens, "held_out")
        return loader.prompts[: self.num_prompts]
