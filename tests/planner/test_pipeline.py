"""The closed forms of a pipeline are those of its tables, of its engine and of the papers."""

import itertools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxscale.parallel.mesh import SCHEDULES, MeshConfig
from jaxscale.parallel.pipeline.schedule import make_schedule
from jaxscale.planner.pipeline import (
    closed_seconds,
    exact_seconds,
    num_branches,
    num_in_flight,
    num_ticks,
)
from jaxscale.run.pretrain import run_batch
from jaxscale.train.step import make_step
from tests.run.runs import load_run, write_run


def test_closed_forms_are_those_of_the_tables():
    for schedule, chunks in (("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 3)):
        for stages, num in itertools.product((2, 3, 4), (1, 2, 4, 6, 9, 12)):
            if chunks > 1 and num % stages:
                continue
            mesh = MeshConfig(pipeline=stages, schedule=schedule, num_chunks=chunks)
            made = make_schedule(schedule, stages, chunks, num)
            assert num_in_flight(mesh, num) == made.num_residual_slots
            assert num_ticks(mesh, num) == made.num_ticks


def test_seconds_of_tables_are_those_of_the_papers():
    """All stages busy with M micro-batches and the head, and idle as each schedule's paper says.

    A zero bubble is idle for longer, as its stages wait for one another at the head, but never
    longer than 1F1B.
    """
    rng = np.random.default_rng(0)
    for schedule, chunks in (("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 3)):
        for stages, num in itertools.product((2, 3, 4, 8), (1, 2, 4, 6, 9, 16, 24)):
            if chunks > 1 and num % stages:
                continue
            weight, head = rng.random(2)
            forward, backward = weight + rng.random(2)
            passes = np.broadcast_to([forward, backward, weight], (chunks, stages, 3))
            mesh = MeshConfig(pipeline=stages, schedule=schedule, num_chunks=chunks)
            exact = exact_seconds(mesh, num, passes, head)
            closed = closed_seconds(mesh, num, passes, head)
            ramp = (stages - 1) * (forward + backward + weight)
            busy = num * (chunks * (forward + backward + weight) + head)
            if schedule == "zero_bubble":
                assert busy + ramp - 2 * (stages - 1) * weight <= exact * (1 + 1e-9)
                assert closed <= exact * (1 + 1e-9) and exact <= (busy + ramp) * (1 + 1e-9)
                assert closed > 0.9 * exact
            else:
                assert exact == pytest.approx(busy + ramp) == pytest.approx(closed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_branches_are_those_of_the_engine(schedule, tmp_path):
    """Those of a tick, and those inside them, of the traced step."""
    num, chunks = 4, 2 if schedule == "interleaved" else 1
    one_stage = "mesh.data=1 mesh.tensor=1 execution.num_loss_chunks=1 model.num_layers=4"
    pipeline = f"mesh.pipeline=2 mesh.schedule='{schedule}' mesh.num_chunks={chunks}"
    one_stage += f" train.num_microbatches={num} execution.is_scanned=False"
    overrides = f"{one_stage} {pipeline}".split()
    run = load_run(write_run(tmp_path), tmp_path, *overrides)
    setup = run.setup(devices=jax.devices()[:2])
    jaxpr = make_step(setup).trace(setup.state, run_batch(run, setup)).jaxpr
    ticks = num_ticks(run.mesh, num)
    (table,) = (each for each in loops(jaxpr.jaxpr) if each.params["length"] == ticks)
    outer, inner = branches(table.params["jaxpr"].jaxpr)
    assert num_branches(run.mesh, num) == ticks * outer + num * chunks * inner


def loops(jaxpr):
    """All loops of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inside in jaxprs_in_params(equation.params):
            yield from loops(inside)


def branches(jaxpr):
    """Conditionals of a program, and the most that can follow inside them."""
    outer = inner = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            outer += 1
            inner += max(sum(branches(each.jaxpr)) for each in equation.params["branches"])
    return outer, inner
