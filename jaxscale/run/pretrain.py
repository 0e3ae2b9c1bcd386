"""`pretrain`: trains a language model, from scratch or from where the last run stopped."""

import dataclasses
import functools
import importlib.metadata
import math
import time
from collections.abc import Callable
from typing import Any

import jax

import jaxscale
from jaxscale.data.loader import make_loader
from jaxscale.data.tokenizer import check_vocabulary, load_tokenizer
from jaxscale.launch.agreement import check_agreement
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.config.model import training_flops_per_token
from jaxscale.models.evaluation import EvaluationContext, check_evaluators
from jaxscale.models.parameters import count_parameters
from jaxscale.parallel.batch import abstract_batch, batch_share
from jaxscale.rlhf.critic import CRITIC
from jaxscale.rlhf.rollouts import TENSOR
from jaxscale.run.evaluation import all_figures, evaluation_context
from jaxscale.run.host import check_host
from jaxscale.run.progress import say_figures, say_what_begins, say_what_came
from jaxscale.run.rollouts import make_answering, prompt_loader
from jaxscale.run.run import Run
from jaxscale.train.loop import Loader, Outcome
from jaxscale.train.metrics import Speed
from jaxscale.train.reporters import check_reporters
from jaxscale.train.setup import Setup
from jaxscale.train.surroundings import surroundings
from jaxscale.train.training import Source, train
from jaxscale.types import Params

VERSIONED = ("jax", "jaxlib", "optax")


def pretrain(*, run: Run) -> Outcome:
    """Trains a run's model; one that was stopped goes on from its newest checkpoint, on any mesh.

    Args:
        run: the run.
    Returns:
        The steps finished and the signal that ended the run early, if any.
    Raises:
        InputError: before anything on disk is touched, when something does not fit.
        NonFiniteError: a loss or gradient norm was not finite.
        RunError: this process could not join the run's others.
    """
    run = run.deterministic()
    with surroundings(run.path, run.runtime) as around:
        run = run.on(jax.device_count())
        # Those that a smaller mesh has no use for are left idle.
        devices = jax.devices()[: math.prod(run.mesh.sizes)] if run.mesh.is_elastic else None
        setup = run.setup(devices)
        check_host(run)
        check_vocabulary(load_tokenizer(run.data.tokenizer), run.model.vocab_size)
        check_reporters(run.reporters)
        context = evaluation_context(run, setup.region, setup.loss_fn)
        evaluate = _make_evaluate(context, run)
        loader, prepare = _make_data(setup, run, context)
        check_agreement(shared_facts(run, loader.state()["depends_on"]))
        began = time.monotonic()
        outcome = train(
            setup,
            loader=loader,
            batch=run_batch(run, setup),
            config=run.train,
            checkpoint=run.checkpoint,
            facts=checkpoint_facts(run.model),
            surroundings=around,
            speed=_make_speed(run),
            prepare=prepare,
            sections=_sections(run),
            evaluate=evaluate,
            reporters=run.reporters,
            announce=functools.partial(say_what_begins, run, loader),
        )
        say_what_came(run, outcome, time.monotonic() - began)
        return outcome


def shared_facts(run: Run, data: dict[str, Any]) -> dict[str, str]:
    """What all processes of a run must have been given alike, by name.

    Not where they find texts and caches, but what the texts are.

    Args:
        run: the run.
        data: what its loader's batches depend on.
    """
    facts = {f"DataConfig.{name}": repr(value) for name, value in data.items()}
    parts = (run.model, run.mesh, run.optimizer, run.train, run.policy, run.execution)
    for part in parts:
        for field in dataclasses.fields(part):
            facts[f"{type(part).__name__}.{field.name}"] = repr(getattr(part, field.name))
    facts["CheckpointConfig.save_every"] = repr(run.checkpoint.save_every)
    facts["jaxscale"] = jaxscale.__version__
    return facts | {name: importlib.metadata.version(name) for name in VERSIONED}


def run_batch(run: Run, setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch of a run as shapes with shardings."""
    data = run.data
    shape = (data.batch_size, data.sequence_length)
    if run.rollouts is None:
        return abstract_batch(setup.mesh, *shape, is_packed=data.is_packed)
    batch = abstract_batch(setup.mesh, *shape, is_packed=True)
    of_critic = () if run.critic is None else ("log_p", "values")
    return batch | dict.fromkeys(("advantages", *of_critic), batch["weights"])


def _sections(run: Run) -> dict[str, Source]:
    if run.critic is None:
        return {}
    facts = checkpoint_facts(run.critic.model)
    return {CRITIC: Source("CriticConfig.init_from", run.critic.init_from, facts)}


def _make_data(
    setup: Setup,
    run: Run,
    context: EvaluationContext,
) -> tuple[Loader, Callable | None]:
    """What a run reads, and what makes a batch of it beside placing it on the mesh."""
    if run.rollouts is not None:
        loader = prompt_loader(run)
        engine = context.engine(TENSOR, run.rollouts.tensor)
        return loader, make_answering(run, setup, loader, engine)
    index, count = batch_share(setup.mesh)
    return make_loader(run.data, split="train", process_index=index, process_count=count), None


def _make_speed(run: Run) -> Speed:
    _, num_active = count_parameters(run.table())
    length = run.data.sequence_length
    flops = training_flops_per_token(run.model, num_active, length)
    return Speed(run.data.batch_size * length, flops)


def _make_evaluate(
    context: EvaluationContext,
    run: Run,
) -> Callable[[Params, int], dict[str, Any]]:
    check_evaluators(run.evaluators, context)

    def evaluate(params: Params, step: int) -> dict[str, Any]:
        now = dataclasses.replace(context, params=params, step=step)
        figures = all_figures(run, now)
        say_figures(step, figures)
        return figures

    return evaluate
