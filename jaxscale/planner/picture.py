"""Plans as pictures: time and memory by stage."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxscale.planner.explain import layout_text
from jaxscale.planner.plan import GIB, Plan
from jaxscale.planner.stages import StagePlan

MIB = 2**20


def draw(plan: Plan, path: str | Path) -> None:
    """Writes a PNG: seconds at work and idle by stage, and a device's bytes by what they are for.

    All stages run one program, so their devices need the same.
    """
    candidate = plan.candidate
    time = candidate.time
    title = f"{plan.devices}: {layout_text(candidate.layout)}"
    figure, of_time, of_memory = _panels(title)
    _draw_time(of_time, time.stages, time.total, "layers, head and their exchanges")
    parts = candidate.memory.parts()
    sizes = [size / GIB for size in parts.values()]
    of_memory.barh(list(parts), sizes)
    limit = candidate.limit_bytes / GIB
    of_memory.set(xlabel=f"GiB on a device of any stage, {limit:.1f} in all")
    figure.savefig(path)


def draw_stages(plan: StagePlan, path: str | Path) -> None:
    """Writes a PNG of a plan of any function: seconds at work and idle, and bytes, by stage."""
    num_devices = [stage.num_replicas for stage in plan.stages]
    title = f"devices by stage: {num_devices}, {plan.num_microbatches} micro-batches"
    figure, of_time, of_memory = _panels(title)
    busy = [plan.num_microbatches * stage.seconds for stage in plan.stages]
    _draw_time(of_time, busy, plan.seconds, "all micro-batches, forward and backward")
    names = _numbers(len(busy))
    sizes = [stage.num_bytes / MIB for stage in plan.stages]
    of_memory.barh(names, sizes)
    of_memory.set(xlabel="MiB on each device of a stage", ylabel="stage")
    figure.savefig(path)


def _panels(title: str) -> tuple[Figure, Axes, Axes]:
    """A figure with room for time and memory; the first stage is at the top."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(title)
    of_time, of_memory = figure.subplots(1, 2)
    of_time.invert_yaxis()
    of_memory.invert_yaxis()
    return figure, of_time, of_memory


def _numbers(count: int) -> list[str]:
    return list(map(str, range(count)))


def _draw_time(
    axes: Axes,
    busy_s: Sequence[float],
    step_s: float,
    label: str,
) -> None:
    names = _numbers(len(busy_s))
    busy = [seconds * 1e3 for seconds in busy_s]
    idle = [step_s * 1e3 - milliseconds for milliseconds in busy]
    axes.barh(names, busy, label=label)
    axes.barh(names, idle, left=busy, color="lightgrey", label="bubble, sums, update")
    axes.set(xlabel="ms of a step", ylabel="stage")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
