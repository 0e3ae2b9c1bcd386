"""Plans of any loss of JAX: traced, cut into components, blocks and stages."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxscale.planner.atomic import make_components
from jaxscale.planner.blocks import MAX_BLOCKS, make_blocks
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.costs import ModelledCosts
from jaxscale.planner.measure import MeasuredCosts
from jaxscale.planner.stages import StagePlan, StagePlanner
from jaxscale.planner.trace import trace
from jaxscale.types import InputError


class FunctionPlan(NamedTuple):
    """A plan, with the seconds that it took to trace the loss and to search."""

    stages: StagePlan
    trace_s: float
    search_s: float


def plan_function(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    *,
    cluster: Cluster,
    limit_bytes: float | None = None,
    num_blocks: int = MAX_BLOCKS,
    measure_on: jax.Device | None = None,
) -> FunctionPlan:
    """Finds stages, their replicas and micro-batches for a loss that knows nothing of them.

    Source: Tanaka et al. 2021, RaNNC (arXiv 2103.16063).
    Args:
        loss: loss(params, batch) -> scalar, a mean or a sum over rows.
        params: arrays or shapes.
        batch: arrays or shapes, each [rows, ...].
        cluster: for which.
        limit_bytes: that a device may need; all of its memory when None.
        num_blocks: between which stages are cut, at most.
        measure_on: a device on which each distinct block runs once; None for costs by FLOPs and
            bytes.
    Raises:
        InputError: the loss cannot be traced, returns no scalar, or the batch's rows differ.
        RunError: no plan fits; says how many bytes the nearest is above the limit.
    """
    began = time.perf_counter()
    rows = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or () in rows:
        raise InputError("batch", sorted(rows), "leaves [rows, ...] with one number of rows")
    components = make_components(trace(loss, params, batch))
    traced = time.perf_counter()
    device = cluster.device
    costs = ModelledCosts(components, device)
    blocks = make_blocks(costs, device.link_bandwidth * device.link_share, num_blocks)
    if measure_on is not None:
        costs = MeasuredCosts(components, device, blocks, measure_on)
    ((num_rows,),) = rows
    planner = StagePlanner(
        costs,
        blocks,
        num_rows=num_rows,
        cluster=cluster,
        limit_bytes=limit_bytes or device.memory_bytes,
    )
    plan = planner.search()
    return FunctionPlan(plan, traced - began, time.perf_counter() - traced)
