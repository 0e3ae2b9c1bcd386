"""A plan as a picture: where the time goes on each stage, and the memory of a device."""

from pathlib import Path

from matplotlib.figure import Figure

from jaxscale.planner.explain import layout_text
from jaxscale.planner.plan import GIB, Plan


def draw(plan: Plan, path: str | Path) -> None:
    """Writes a PNG: seconds at work and idle by stage, and bytes by what they are for."""
    candidate = plan.candidate
    time, memory = candidate.time, candidate.memory
    figure = Figure(figsize=(10, 4), layout="constrained")
    of_time, of_memory = figure.subplots(1, 2)
    names = [str(number) for number in range(len(time.stages))]
    busy = [seconds * 1e3 for seconds in time.stages]
    idle = [time.total * 1e3 - milliseconds for milliseconds in busy]
    of_time.barh(names, busy, label="layers, head and their exchanges")
    of_time.barh(names, idle, left=busy, color="lightgrey", label="bubble, reduction, update")
    of_time.set(xlabel="ms of a step", ylabel="stage")
    of_time.invert_yaxis()
    of_time.legend(loc="lower right")
    parts = memory.parts()
    of_memory.barh(list(parts), [size / GIB for size in parts.values()])
    of_memory.set(xlabel=f"GiB, of {candidate.limit_bytes / GIB:.1f} in all")
    of_memory.invert_yaxis()
    figure.suptitle(f"{plan.devices}: {layout_text(candidate.layout)}")
    figure.savefig(path)
