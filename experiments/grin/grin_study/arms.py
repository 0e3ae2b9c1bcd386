"""Several ways of training, each from the same seeds, with the step and data of a real run."""

import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grin_study.routing import DomainSums, domain_sums
from jaxscale.data.loader import DataConfig, HeldOutLoader, TrainLoader, make_loader
from jaxscale.data.tokenizer import check_vocabulary, load_tokenizer
from jaxscale.models.evaluation import EvaluationContext
from jaxscale.models.parameters import count_parameters
from jaxscale.run.evaluation import evaluation_context
from jaxscale.run.run import Run
from jaxscale.train.setup import Setup
from jaxscale.train.state import TrainState
from jaxscale.train.step import Step, make_step
from jaxscale.types import InputError, RunError


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training. The first seed compiles its step and evaluation for all seeds."""

    name: str
    run: Run
    setup: Setup
    step: Step
    context: EvaluationContext
    held_out: dict[str, HeldOutLoader]


def make_arm(name: str, run: Run) -> Arm:
    """Set an arm's run up and open its held-out documents.

    Raises:
        InputError: the run's parts do not fit one another, or a source has no held-out documents.
    """
    check_vocabulary(load_tokenizer(run.data.tokenizer), run.model.vocab_size)
    setup = run.setup()
    context = evaluation_context(run, setup.region, setup.loss_fn)
    return Arm(
        name=name,
        run=run,
        setup=setup,
        step=make_step(setup),
        context=context,
        held_out=dict(_held_out_by_domain(run.data)),
    )


def run_seed(arm: Arm, seed: int) -> dict[str, Any]:
    """Train an arm once and evaluate it on each source's held-out documents.

    The seed decides the initial parameters, the random draws and the order of the rows. Arms with
    the same parameters and data therefore start from the same values and see the same rows.

    Returns:
        A dictionary for a JSON line: `arm`, `seed`, `parameters` and `active` of the model,
        `steps`, `seconds` of training (the first seed's include compilation), `train_nll` of each
        step, `loss` in nats per token over all domains, and `domains`: name -> `loss` in nats per
        token, `tokens` and, for a mixture of experts, `load` [MoE layers, E].
    Raises:
        InputError: the run would see a row twice.
        RunError: a loss or gradient norm was not finite.
    """
    run, steps = arm.run, arm.run.train.steps
    loader = make_loader(dataclasses.replace(run.data, seed=seed))
    _check_single_epoch(loader, run.data, steps)
    state = arm.setup.init(seed)
    began = time.perf_counter()
    state, nll = _train(arm, seed, state, loader)
    seconds = time.perf_counter() - began
    context = dataclasses.replace(arm.context, params=state.params, step=steps)
    sums = domain_sums(context, arm.held_out)
    total, active = count_parameters(run.table())
    return {
        "arm": arm.name,
        "seed": seed,
        "parameters": total,
        "active": active,
        "steps": steps,
        "seconds": seconds,
        "train_nll": [float(each) for each in nll],
        "loss": _loss_over_all(sums.values()),
        "domains": {name: _figures(each) for name, each in sums.items()},
    }


def _train(
    arm: Arm, seed: int, state: TrainState, loader: TrainLoader
) -> tuple[TrainState, list[jax.Array]]:
    """The trained state, and the loss of each step, which is still on the device."""
    nll = []
    for _ in range(arm.run.train.steps):
        state, metrics = arm.step(state, arm.context.place(next(loader)))
        nll.append(metrics["nll"])
    # Reading this also waits for the last step, which the caller times.
    if not bool(metrics["is_finite"]):
        step = int(state.step)
        raise RunError(f"{arm.name}, seed {seed}: the loss is not finite after step {step}")
    return state, nll


def _check_single_epoch(loader: TrainLoader, data: DataConfig, steps: int) -> None:
    """Raise InputError if a source has fewer rows than the run draws from it."""
    weights = np.array(data.weights or [1.0] * len(data.sources))
    rows_needed = np.ceil(steps * data.batch_size * weights / weights.sum())
    if (rows_needed > loader.rows_per_epoch).any():
        of_rows = f"{rows_needed.astype(int).tolist()} of {loader.rows_per_epoch} rows"
        expected = f"so few that no row comes twice: {of_rows}"
        raise InputError("TrainConfig.steps", steps, expected)


def _held_out_by_domain(data: DataConfig) -> Iterator[tuple[str, HeldOutLoader]]:
    """Each source's held-out documents, under the name of its first file or folder."""
    for source in data.sources:
        domain = Path(source.paths[0]).name.partition(".")[0]
        only_source = dataclasses.replace(data, sources=(source,), weights=None)
        yield domain, make_loader(only_source, split="held_out")


def _loss_over_all(sums: Collection[DomainSums]) -> float:
    """Nats per token over all domains. Dividing once weighs every token alike."""
    return sum(each.nll for each in sums) / sum(each.tokens for each in sums)


def _figures(sums: DomainSums) -> Mapping[str, Any]:
    figures = {"loss": sums.nll / sums.tokens, "tokens": sums.tokens}
    if sums.load is not None:
        figures["load"] = sums.load.tolist()
    return figures
