"""What a run learns from that answers prompts itself: its prompts, and its answers on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxscale.data.prompt_loader import PromptLoader
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.launch.memory import check_fits
from jaxscale.parallel.batch import place
from jaxscale.rlhf.experience import Experience, make_experience
from jaxscale.rlhf.rollouts import TENSOR, Rollouts, advantages
from jaxscale.run.run import Run
from jaxscale.serve.decoding import check_prompts
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.train.setup import Setup
from jaxscale.types import Batch, InputError, Params


def prompt_loader(run: Run) -> PromptLoader:
    """The prompts of a run; as many at a time as a batch has rows for their answers.

    Raises:
        InputError: the batch does not divide, no prompt fits, or there are several processes.
    """
    size, num = run.data.batch_size, run.rollouts.num_answers
    if rest := size % num:
        expected = f"batch_size % num_answers == 0, here {size} % {num} = {rest}"
        raise InputError("DataConfig.batch_size", size, expected)
    if jax.process_count() > 1:
        expected = "1 with Run.rollouts: one process writes all answers"
        raise InputError("RuntimeConfig.processes", jax.process_count(), expected)
    loader = PromptLoader(run.data, num, run.rollouts.max_new_tokens)
    tokens = [prompt.tokens for prompt in loader.prompts]
    check_prompts(tokens, run.model, run.rollouts.max_new_tokens)
    return loader


def make_answering(
    run: Run,
    setup: Setup,
    loader: PromptLoader,
    engine: HybridEngine,
) -> Callable[[Params, Batch], tuple[Batch, dict[str, Any]]]:
    """(parameters, what the loader gave) -> (rows of answers on the mesh, figures of them).

    Args:
        run: the run.
        setup: of its training.
        loader: of its prompts.
        engine: that writes the answers.
    Raises:
        InputError: a reward refuses the prompts, or devices cannot hold what writes beside the
            state.
    """
    _check_room(setup, engine)
    tokenizer = load_tokenizer(run.data.tokenizer)
    run.rollouts.check(tokenizer, loader.prompts)
    rollouts = Rollouts(
        run.rollouts,
        engine=engine,
        tokenizer=tokenizer,
        length=run.data.sequence_length,
        seed=run.train.seed,
    )
    judged = experience_of(run, setup)

    def answered(params: Params, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        prompts = [loader.prompts[number] for number in batch["prompts"]]
        rows, rewards, figures = rollouts(params, prompts, batch["draws"])
        ready, of_learning = judged(params, rows, rewards)
        return ready, figures | of_learning

    return answered


def experience_of(run: Run, setup: Setup) -> Experience:
    """(parameters, rows of answers, their rewards) -> (what the run's loss takes, figures)."""
    has_critic = run.critic is not None
    return make_experience(setup.loss_fn, setup.region) if has_critic else _compared(setup)


def _check_room(setup: Setup, engine: HybridEngine) -> None:
    """Refuses a copy that writes beside the state; while answers are written no gradient is left.

    A model that is too large to be trained is refused as such.
    """
    resting = setup.resting()
    check_fits("model", resting)
    state = {name: part for name, part in resting.items() if name != "gradients"}
    check_fits(TENSOR, state | {"a copy that writes": engine.abstract})


def _compared(setup: Setup) -> Experience:
    """What `PolicyLoss` learns from: each answer, compared with the others to its prompt."""

    def compared(params: Params, rows: Batch, rewards: np.ndarray) -> tuple[Batch, dict[str, Any]]:
        of_rows = advantages(rewards).reshape(-1, 1).astype(np.float32)
        of_tokens = np.broadcast_to(of_rows, rows["weights"].shape).copy()
        return place(setup.mesh, rows | {"advantages": of_tokens}), {}

    return compared
