"""A run's evaluators: what they are given, and their figures by name."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.models.evaluation import EvaluationContext
from jaxscale.parallel.batch import place
from jaxscale.parallel.region import LossFn, Region
from jaxscale.run.run import Run
from jaxscale.types import Params


def evaluation_context(run: Run, region: Region, loss_fn: LossFn) -> EvaluationContext:
    """What the evaluators of a run are given, before there are parameters."""
    return EvaluationContext(
        params=None,
        step=0,
        model=run.model,
        mesh=region.mesh,
        sums=jax.jit(region.evaluate(loss_fn)),
        place=functools.partial(place, region.mesh),
        whole=_make_whole(region),
    )


def all_figures(run: Run, context: EvaluationContext) -> dict[str, Any]:
    """The figures of all evaluators of a run, by "evaluator/figure"."""
    return {
        f"{name}/{figure}": value
        for name, evaluator in run.evaluators.items()
        for figure, value in evaluator(context).items()
    }


def _make_whole(region: Region) -> Callable[[Params], Params]:
    """Gathers parameters, in the order of the layers, onto this process's first device."""
    layout, dims = region.specs.layout, region.specs.dims
    everywhere = NamedSharding(region.mesh, PartitionSpec())
    gather = jax.jit(lambda params: layout.restore(params, dims), out_shardings=everywhere)

    def whole(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), gather(params))

    return whole
