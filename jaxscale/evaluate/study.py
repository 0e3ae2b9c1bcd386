"""Controlled studies: several ways of training, each from the same seeds, through the very step and data of a run."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxscale.data.loader import DataConfig, HeldOutLoader, TrainLoader, make_loader
from jaxscale.data.tokenizer import check_vocabulary, load_tokenizer
from jaxscale.evaluate.equivalence import Comparison, compare_paired
from jaxscale.evaluate.routing import domain_sums
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import count_parameters
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.evaluation import EvaluationContext
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.plan import Plan, TrainConfig, make_plan
from jaxscale.train.state import TrainState, init_state
from jaxscale.train.step import make_step
from jaxscale.types import Batch, InputError, RunError


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training; its step and evaluation are compiled by the first seed and serve all others."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    plan: Plan
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    context: EvaluationContext
    held_out: dict[str, HeldOutLoader]


def make_arm(
    name: str,
    *,
    model: ModelConfig,
    mesh: MeshConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    policy: Policy = Policy(),
    stack: StackConfig = StackConfig(),
) -> Arm:
    """Lays an arm out and opens its held-out documents.

    Args: as `train.pretrain.pretrain`; `name` is the arm's.
    Raises:
        InputError: the parts do not fit one another, or a source has no held-out documents.
    """
    check_vocabulary(load_tokenizer(data.tokenizer), model.vocab_size)
    plan = make_plan(
        model=model,
        mesh=mesh,
        data=data,
        optimizer=optimizer,
        train=train,
        policy=policy,
        stack=stack,
    )
    context = EvaluationContext(
        params=None,
        step=0,
        model=model,
        mesh=plan.mesh,
        sums=jax.jit(plan.region.evaluate(plan.loss_fn)),
        place=functools.partial(place, plan.mesh),
    )
    step = make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state)
    return Arm(name, model, data, train, plan, step, context, dict(_domains(data)))


def run_seed(arm: Arm, seed: int) -> dict[str, Any]:
    """Trains an arm once and evaluates it on each source's held-out documents.

    The seed decides the initial parameters, what is drawn and the order of the rows; arms of the
    same parameters and data begin and go on alike.

    Returns:
        JSON-able: `arm`, `seed`, `parameters` and `active` of the model, `steps`, `seconds` of
        training, with the first seed's compilation, `train_nll` of each step, `domains`: name ->
        `loss` (nats a token), `tokens` and, for a mixture of experts, `load` [MoE layers, E]; and
        `loss` over the tokens of all domains.
    Raises:
        InputError: the run would see a row twice.
        RunError: a loss or gradient norm was not finite.
    """
    data, plan = dataclasses.replace(arm.data, seed=seed), arm.plan
    loader = make_loader(data)
    _check_single_epoch(loader, data, arm.train.steps)
    settings = dict(specs=plan.region.specs, seed=seed, trainable=arm.train.trainable)
    state, nll = init_state(arm.model, plan.optimizer, plan.state, **settings), []
    began = time.perf_counter()
    for _ in range(arm.train.steps):
        state, metrics = arm.step(state, arm.context.place(next(loader)))
        nll.append(metrics["nll"])
    if not bool(metrics["is_finite"]):
        raise RunError(
            f"{arm.name}, seed {seed}: the loss is not finite after step {int(state.step)}"
        )
    seconds = time.perf_counter() - began
    context = dataclasses.replace(arm.context, params=state.params, step=arm.train.steps)
    sums = domain_sums(context, arm.held_out)
    total, active = count_parameters(arm.model)
    return {
        "arm": arm.name,
        "seed": seed,
        "parameters": total,
        "active": active,
        "steps": arm.train.steps,
        "seconds": seconds,
        "train_nll": [float(each) for each in nll],
        "loss": sum(each.nll for each in sums.values())
        / sum(each.tokens for each in sums.values()),
        "domains": {
            name: {"loss": each.nll / each.tokens, "tokens": each.tokens}
            | ({} if each.load is None else {"load": each.load.tolist()})
            for name, each in sums.items()
        },
    }


def _check_single_epoch(loader: TrainLoader, data: DataConfig, steps: int) -> None:
    weights = np.array(data.weights or [1.0] * len(data.sources))
    wanted = np.ceil(steps * data.batch_size * weights / weights.sum())
    if (wanted > loader.rows_per_epoch).any():
        expected = f"so few that no row comes twice: {wanted.astype(int).tolist()} of {loader.rows_per_epoch} rows"
        raise InputError("TrainConfig.steps", steps, expected)


def _domains(data: DataConfig) -> Iterator[tuple[str, HeldOutLoader]]:
    """Each source's held-out documents, by the name of its first file or folder."""
    for source in data.sources:
        one = dataclasses.replace(data, sources=(source,), weights=None)
        yield Path(source.paths[0]).name.partition(".")[0], make_loader(one, split="held_out")


def compare_arms(
    runs: list[Mapping[str, Any]], pairs: list[tuple[str, str]], *, margin: float
) -> dict[tuple[str, str], Comparison]:
    """The held-out losses of each pair of arms, over the seeds that both have.

    Args:
        runs: what `run_seed` returned.
        pairs: (first, second); the difference is first - second.
        margin: nats a token.
    Raises:
        InputError: an arm has two runs of one seed.
    """
    losses: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["seed"] in losses.setdefault(run["arm"], {}):
            raise InputError(
                "runs",
                f"two of arm {run['arm']!r} and seed {run['seed']}",
                "one run an arm and seed",
            )
        losses[run["arm"]][run["seed"]] = run["loss"]
    found = {}
    for first, second in pairs:
        seeds = sorted(losses[first].keys() & losses[second].keys())
        sides = [[losses[arm][seed] for seed in seeds] for arm in (first, second)]
        found[first, second] = compare_paired(*sides, margin=margin)
    return found
