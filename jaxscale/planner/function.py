"""Plans of any loss of JAX: traced, cut into components, blocks and stages."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxscale.planner.atomic import Components, make_components
from jaxscale.planner.blocks import MAX_BLOCKS, make_blocks
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.costs import ModelledCosts
from jaxscale.planner.measure import MeasuredCosts
from jaxscale.planner.stages import Stage, StagePlan, StagePlanner
from jaxscale.planner.trace import trace
from jaxscale.types import InputError


class FunctionPlan(NamedTuple):
    """A plan, with the seconds that it took to trace the loss and to search."""

    stages: StagePlan
    components: Components
    trace_s: float
    search_s: float

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, with the hash of the program that it is for."""
        stages = []
        for stage in self.stages.stages:
            members = sorted(stage.part.members)
            stages.append([members, stage.num_replicas, stage.seconds, stage.num_bytes])
        saved = {
            "program": _hash(self.components),
            "num_microbatches": self.stages.num_microbatches,
            "seconds": self.stages.seconds,
            "stages": stages,
        }
        Path(path).write_text(json.dumps(saved) + "\n")


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
    return FunctionPlan(plan, components, traced - began, time.perf_counter() - traced)


def load_plan(
    path: str | Path,
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    *,
    cluster: Cluster,
) -> StagePlan:
    """The plan that `FunctionPlan.save` wrote, for the same loss and shapes.

    Raises:
        InputError: the file is no plan, or it is for another program.
    """
    components = make_components(trace(loss, params, batch))
    try:
        saved = json.loads(Path(path).read_text())
        program, rows = saved["program"], saved["stages"]
        num_microbatches, seconds = saved["num_microbatches"], saved["seconds"]
    except (ValueError, KeyError, TypeError) as error:
        expected = f"a plan that `FunctionPlan.save` wrote ({error})"
        raise InputError("path", str(path), expected) from None
    if program != _hash(components):
        expected = "a plan for this loss, with these shapes"
        raise InputError("path", str(path), expected)
    costs = ModelledCosts(components, cluster.device)
    stages = []
    for members, *figures in rows:
        part = costs.merged(costs.atoms[each] for each in members)
        stages.append(Stage(part, *figures))
    return StagePlan(tuple(stages), num_microbatches, seconds)


def _hash(components: Components) -> str:
    """Of a program with its shapes."""
    text = str(components.traced.program)
    return hashlib.sha256(text.encode()).hexdigest()
