"""A plan: a layout with its estimate, saved, loaded and compared."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxscale.parallel.mesh import MeshConfig
from jaxscale.planner.explain import layout_text
from jaxscale.planner.job import Layout
from jaxscale.planner.memory import StepMemory
from jaxscale.planner.search import Candidate
from jaxscale.planner.step_time import StepTime
from jaxscale.types import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a search chose.

    Args:
        devices: for which, such as "h200:2x8".
        candidate: the layout with its estimate.
    """

    devices: str
    candidate: Candidate

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads what `save` wrote.

        Raises:
            InputError: the file is no plan.
        """
        try:
            return _from_json(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            expected = f"a plan that `jaxscale plan` wrote ({error})"
            raise InputError("plan", str(path), expected) from None


def _from_json(saved: dict[str, Any]) -> Plan:
    candidate = saved["candidate"]
    layout = candidate["layout"]
    mesh = layout.pop("mesh")
    # JSON has lists where a mesh has tuples.
    mesh = {name: tuple(v) if isinstance(v, list) else v for name, v in mesh.items()}
    time = candidate["time"]
    return Plan(
        saved["devices"],
        Candidate(
            layout=Layout(MeshConfig(**mesh), **layout),
            time=StepTime(time["parts"], tuple(time["stages"])),
            memory=StepMemory(**candidate["memory"]),
            limit_bytes=candidate["limit_bytes"],
        ),
    )


def compare(first: Plan, second: Plan) -> str:
    """Two plans side by side: milliseconds and GiB of every part, and what the second changes."""
    one, other = first.candidate, second.candidate
    lines = [
        f"1: {first.devices}, {layout_text(one.layout)}",
        f"2: {second.devices}, {layout_text(other.layout)}",
        f"{'':<12} {'1':>10} {'2':>10} {'change':>10}",
    ]
    lines += _rows(one.time.parts, other.time.parts, 1e-3, "ms")
    lines += _rows({"step": one.time.total}, {"step": other.time.total}, 1e-3, "ms")
    lines += _rows(one.memory.parts(), other.memory.parts(), GIB, "GiB")
    lines += _rows({"memory": one.memory.total}, {"memory": other.memory.total}, GIB, "GiB")
    return "\n".join(lines)


def _rows(
    one: dict[str, float],
    other: dict[str, float],
    unit: float,
    unit_name: str,
) -> list[str]:
    """A row for each part that either has."""
    rows = []
    for name in {**one, **other}:
        before, after = one.get(name, 0.0) / unit, other.get(name, 0.0) / unit
        if before or after:
            rows.append(
                f"{name:<12} {before:>10.2f} {after:>10.2f} {after - before:>+10.2f} {unit_name}"
            )
    return rows
