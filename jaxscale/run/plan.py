"""`plan`: the fastest mesh for a run on devices that need not be here, as a file to train with."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from jaxscale.config import operative_config
from jaxscale.launch.runtime import apply_runtime
from jaxscale.planner.calibration import measured
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.explain import details, layout_text, table, why
from jaxscale.planner.layer_scale import MeasuredLayers, OutOfMemory
from jaxscale.planner.layer_time import LayerClock
from jaxscale.planner.picture import draw
from jaxscale.planner.plan import Plan
from jaxscale.planner.search import Candidate, Planner
from jaxscale.planner.timing import BlockTimes
from jaxscale.run.compile import apply_for_compiling, memory_share
from jaxscale.run.job import job_of, layout_of
from jaxscale.run.planned import SHARE_OF_LIMIT, planned, search
from jaxscale.run.planned_memory import CompiledMemory
from jaxscale.run.run import Run
from jaxscale.types import InputError, RunError
from jaxscale.written import as_written, render

GIB = 2**30


def plan(
    *,
    run: Run,
    devices: str,
    output: str = "plan.gin",
    pinned: dict[str, Any] | None = None,
    measure: bool = False,
    num_compiled: int = 0,
    picture: str | None = None,
) -> Plan:
    """Prints the fastest layouts for a run and writes the first as a file for `pretrain`.

    Nothing is allocated, no data is read and no device is needed.

    Args:
        run: the run; its own mesh is compared with the others.
        devices: such as "h200:2x8", 2 hosts of 8; "h200:2x8-3" if 3 of them are gone.
        output: the file that is written, and beside it the same name with .json, which
            `planner.plan.Plan.load` reads.
        pinned: values that are given, such as {"tensor": 2}, see `planner.space.PINNABLE`.
        measure: time matmuls, passes over memory and links on the devices that are here, in place
            of the device table's shares; then each distinct layer of the best layouts, once.
        num_compiled: so many of the best are compiled for the devices, plans of one program once;
            the first that then fits is taken, whose memory is the compiler's.
        picture: a PNG file of time and memory by stage; None for none.
    Returns:
        The plan that is written.
    Raises:
        InputError: unknown devices, values that cannot be pinned, or devices that one cannot
            compile for.
        RunError: nothing fits; says what comes nearest and how many bytes are missing.
    """
    cluster, share = Cluster.parse(devices), memory_share()
    for name, file in (("output", output), ("picture", picture)):
        if file is not None and not Path(file).parent.is_dir():
            raise InputError(name, file, "a file in a folder that exists")
    if measure:
        # What is measured has the flags and the kernels that the run trains with.
        apply_runtime(dataclasses.replace(run.runtime, processes=None), ".")
        cluster = _calibrated(cluster)
    elif num_compiled:
        apply_for_compiling(run.runtime)
    began, job = time.perf_counter(), job_of(run)
    found = search(job, cluster, pinned or {}, share)
    seconds = time.perf_counter() - began
    print(f"{cluster.text}: {found.num_layouts:,} layouts in {seconds:.1f} s")
    limit_bytes = cluster.device.memory_bytes * share * SHARE_OF_LIMIT
    planner, ranked = Planner(job, cluster, limit_bytes), found.ranked
    if measure:
        planner, ranked = _measured(planner, ranked)
    best = ranked[0]
    print(table(ranked, best))
    print(f"\n{_own(run, planner, best)}\n")
    if num_compiled:
        best = _first_that_fits(run, cluster, share, ranked[:num_compiled])
    print(details(best))
    chosen = Plan(cluster.text, best)
    chosen.save(Path(output).with_suffix(".json"))
    Path(output).write_text(planned_text(run, chosen))
    if picture is not None:
        draw(chosen, picture)
    print(f"\nwritten: {output}")
    return chosen


def _calibrated(cluster: Cluster) -> Cluster:
    """The cluster with the shares that the devices here reach."""
    if jax.default_backend() == "cpu":
        raise InputError("measure", True, "False where there is only a CPU to measure")
    device = measured(cluster.device, jax.local_devices())
    shares = (device.matmul_share, device.memory_share, device.link_share)
    print("matmuls, memory and links at {:.2f}, {:.2f} and {:.2f} of their peaks".format(*shares))
    return dataclasses.replace(cluster, device=device)


def _measured(
    planner: Planner,
    ranked: tuple[Candidate, ...],
) -> tuple[Planner, tuple[Candidate, ...]]:
    """The candidates by measured layers, without those whose layers run out of memory."""
    began, times = time.perf_counter(), BlockTimes(jax.local_devices()[0])
    job, cluster = planner.job, planner.cluster
    scale = MeasuredLayers(job, times, LayerClock(job, cluster))
    by_layers = Planner(job, cluster, planner.limit_bytes, scale)
    possible = []
    for each in ranked:
        try:
            possible.append(by_layers.estimate(each.layout))
        except OutOfMemory as error:
            print(f"impossible: {layout_text(each.layout)}: {error}")
    seconds = time.perf_counter() - began
    print(f"measured {times.num_measured} layers and heads in {seconds:.1f} s")
    if not possible:
        raise RunError("in every layout a layer ran out of memory when it was measured")
    return by_layers, tuple(sorted(possible, key=lambda each: each.rank))


def planned_text(run: Run, chosen: Plan) -> str:
    """A gin file: the configuration of this call, then what the plan changes."""
    best = chosen.candidate
    changed = planned(run, best.layout)
    values, fields = {}, {}
    for name in ("mesh", "train", "execution"):
        values[name], more = as_written(getattr(changed, name), ("plan", name))
        fields |= more
    header = (
        f"# Plan for {chosen.devices}: {layout_text(best.layout)}.\n"
        f"# Modelled: {best.time.total * 1e3:.1f} ms a step, "
        f"{best.memory.total / GIB:.1f} GiB a device.\n"
    )
    return header + operative_config() + render({((), Run): values, **fields})


def _own(run: Run, planner: Planner, best: Candidate) -> str:
    """How the run's own mesh compares."""
    cluster, layout = planner.cluster, layout_of(run)
    text = layout_text(layout)
    if layout.num_devices != cluster.num_devices:
        return f"the file's own mesh is for {layout.num_devices} devices: {text}"
    try:
        own = planner.estimate(layout)
    except (InputError, OutOfMemory) as error:
        return f"the file's own mesh is impossible: {error}"
    return f"the file's own mesh: {own.time.total * 1e3:.1f} ms, {text}: {why(own, best)}"


def _first_that_fits(
    run: Run,
    cluster: Cluster,
    share: float,
    ranked: tuple[Candidate, ...],
) -> Candidate:
    """The first whose step, compiled for the devices, fits; with the compiler's memory."""
    limit, fitting = cluster.device.memory_bytes * share, []
    began = time.perf_counter()
    peaks = CompiledMemory(run, cluster)([each.layout for each in ranked])
    print(f"compiled {len(ranked)} in {time.perf_counter() - began:.1f} s")
    for number, (each, peak) in enumerate(zip(ranked, peaks, strict=True), 1):
        print(f"{number} compiled: {peak / GIB:.2f} GiB, {each.memory.total / GIB:.2f} modelled")
        if peak <= limit:
            memory = each.memory.corrected(peak)
            fitting.append(dataclasses.replace(each, memory=memory, limit_bytes=limit))
    if not fitting:
        raise RunError(f"none of the {len(ranked)} that were compiled fits {limit / GIB:.2f} GiB")
    return fitting[0]
