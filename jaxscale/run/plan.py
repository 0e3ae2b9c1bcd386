"""`plan`: the fastest mesh for a run on devices that need not be here, as a file to train with."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from jaxscale.config import operative_config
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.explain import details, layout_text, table, why
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.search import Candidate, Planner
from jaxscale.run.compile import memory_share
from jaxscale.run.run import Run
from jaxscale.types import InputError, RunError
from jaxscale.written import as_written, render

# Of JAX's share; the rest is for what the model of the memory does not know.
SHARE_OF_LIMIT = 0.95
HEADER = (
    "# A plan for {devices}: {layout}.\n# Modelled: {ms:.1f} ms a step, {gib:.1f} GiB a device.\n"
)


def plan(
    *,
    run: Run,
    devices: str,
    output: str = "plan.gin",
    pinned: dict[str, Any] | None = None,
) -> Candidate:
    """Prints the fastest meshes for a run and writes the first as a file for `pretrain`.

    Nothing is allocated, no data is read and no device is needed.

    Args:
        run: the run; its own mesh is compared with the others.
        devices: such as "h200:2x8", 2 hosts of 8; "h200:2x8-3" if 3 of them are gone.
        output: the file that is written.
        pinned: values that are given, such as {"tensor": 2}, see `planner.space.PINNABLE`.
    Returns:
        The best.
    Raises:
        InputError: unknown devices, or values that cannot be pinned.
        RunError: nothing fits; says what comes nearest and how many bytes are missing.
    """
    cluster, share = Cluster.parse(devices), memory_share()
    planner = Planner(job_of(run), cluster, cluster.device.memory_bytes * share * SHARE_OF_LIMIT)
    began = time.perf_counter()
    found = planner.search(pinned or {})
    seconds = time.perf_counter() - began
    best = found.best
    print(f"{cluster.text}: {found.num_layouts:,} layouts in {seconds:.1f} s")
    if not best.fits:
        over = f"{best.excess_bytes:,.0f} bytes above {best.limit_bytes:,.0f}"
        raise RunError(f"no layout fits; the nearest is {over}: {layout_text(best.layout)}")
    print(table(found.ranked, best))
    print(f"\n{_own(planner, run, best)}\n\n{details(best)}")
    Path(output).write_text(planned_text(run, best, cluster.text))
    print(f"\nwritten: {output}")
    return best


def job_of(run: Run) -> Job:
    """What of a run does not depend on its mesh."""
    return Job(
        model=run.model,
        batch_size=run.data.batch_size,
        length=run.data.sequence_length,
        policy=run.policy,
        optimizer=run.optimizer,
        execution=run.execution,
        train=run.train,
    )


def planned(run: Run, layout: Layout) -> Run:
    """The run spread as a layout says."""
    return dataclasses.replace(
        run,
        mesh=layout.mesh,
        train=dataclasses.replace(run.train, num_microbatches=layout.num_microbatches),
        execution=dataclasses.replace(
            run.execution, remat=layout.remat, is_scanned=layout.is_scanned
        ),
    )


def planned_text(run: Run, best: Candidate, devices: str) -> str:
    """A gin file: the configuration of this call, then what the plan changes."""
    changed = planned(run, best.layout)
    values, fields = {}, {}
    for name in ("mesh", "train", "execution"):
        values[name], more = as_written(getattr(changed, name), ("plan", name))
        fields |= more
    header = HEADER.format(
        devices=devices,
        layout=layout_text(best.layout),
        ms=best.time.total * 1e3,
        gib=best.memory.total / 2**30,
    )
    return header + operative_config() + render({((), Run): values, **fields})


def _own(planner: Planner, run: Run, best: Candidate) -> str:
    """How the run's own mesh compares."""
    layout = Layout(
        run.mesh, run.train.num_microbatches, run.execution.remat, run.execution.is_scanned
    )
    try:
        own = planner.estimate(layout)
    except InputError as error:
        return f"the file's own mesh is impossible: {error}"
    milliseconds = own.time.total * 1e3
    return f"the file's own mesh: {milliseconds:.1f} ms, {layout_text(layout)}: {why(own, best)}"
