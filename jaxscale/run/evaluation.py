"""A run's evaluators: what they are given, and their figures by name."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxscale.data.loader import DataConfig
from jaxscale.models.evaluation import EvaluationContext
from jaxscale.models.execution import ByChunk
from jaxscale.parallel.batch import place
from jaxscale.parallel.mesh import check_multiple
from jaxscale.parallel.region import LossFn, Region
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.run.fit import check_attention
from jaxscale.run.run import Run
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.types import InputError


def evaluation_context(run: Run, region: Region, loss_fn: LossFn) -> EvaluationContext:
    """What the evaluators of a run are given, before there are parameters."""
    return EvaluationContext(
        params=None,
        step=0,
        model=run.model,
        mesh=region.mesh,
        sums=jax.jit(region.evaluate(loss_fn)),
        place=functools.partial(place, region.mesh),
        engine=_make_engines(run, region),
        check_data=functools.partial(check_data, run),
    )


def all_figures(run: Run, context: EvaluationContext) -> dict[str, Any]:
    """The figures of all evaluators of a run, by "evaluator/figure"."""
    return {
        f"{name}/{figure}": value
        for name, evaluator in run.evaluators.items()
        for figure, value in evaluator(context).items()
    }


def check_data(run: Run, owner: str, data: DataConfig) -> None:
    """Refuses data whose batches a run's mesh, strategy or loss cannot evaluate.

    Args:
        run: the run. Its micro-batches do not count: a batch is evaluated as one.
        owner: the evaluator that goes over the data.
        data: of the evaluator.
    Raises:
        InputError: with the equation that fails and the nearest sizes for which all hold.
    """
    mesh, rows, length = run.mesh, data.batch_size, data.sequence_length
    batch_size = f"DataConfig.batch_size of {owner}"
    axes = f"({mesh.data} * {mesh.expert})"
    check_multiple(batch_size, rows, mesh.num_batch_shards, "batch_size % (data * expert)", axes)
    is_chunked = isinstance(run.execution.strategy, FullyPipelined)
    if is_chunked and mesh.tensor > 1 and rows > mesh.num_batch_shards:
        expected = (
            "batch_size == data * expert with FullyPipelined and MeshConfig.tensor > 1, here "
            f"{mesh.num_batch_shards}"
        )
        raise InputError(batch_size, rows, expected)
    _check_length(run, f"DataConfig.sequence_length of {owner}", length)
    if mesh.ring == 1:
        check_attention(dataclasses.replace(run, data=data))


def _check_length(run: Run, parameter: str, length: int) -> None:
    """Refuses a length that is not a multiple of what the run cuts sequences into."""
    longest = run.model.max_length
    if length > longest:
        raise InputError(parameter, length, f"sequence_length <= max_length = {longest}")
    factors = _factors(run)
    whole = math.lcm(*(factor for _, factor in factors.values()))
    multiples = (length // whole * whole, (length // whole + 1) * whole)
    nearest = " or ".join(str(size) for size in multiples if 0 < size <= longest)
    for names, (numbers, factor) in factors.items():
        if rest := length % factor:
            equation = f"sequence_length % {names} == 0, here {length} % {numbers} = {rest}"
            raise InputError(parameter, length, f"{equation}; nearest: {nearest}")


def _factors(run: Run) -> dict[str, tuple[str, int]]:
    """What divides the length of a sequence: by its name, in numbers, and their product."""
    mesh, execution, strategy = run.mesh, run.execution, run.execution.strategy
    sequence, tensor, num = mesh.sequence, mesh.tensor, execution.num_loss_chunks
    of_loss = f"({sequence} * {tensor} * {num})", sequence * tensor * num
    found = {"(sequence * tensor * num_loss_chunks)": of_loss}
    if mesh.ring > 1:
        found["(2 * ring)"] = f"(2 * {mesh.ring})", 2 * mesh.ring
    if isinstance(strategy, FullyPipelined):
        found["chunk_tokens"] = str(strategy.chunk_tokens), strategy.chunk_tokens
    if isinstance(strategy, ByChunk):
        num = strategy.num_chunks
        found["(sequence * num_chunks)"] = f"({sequence} * {num})", sequence * num
    return found


def _make_engines(run: Run, region: Region) -> Callable[[str, int], HybridEngine]:
    made = {}

    def engine(parameter: str, tensor: int) -> HybridEngine:
        if tensor not in made:
            made[tensor] = HybridEngine(run.model, run.policy, region, tensor, parameter)
        return made[tensor]

    return engine
