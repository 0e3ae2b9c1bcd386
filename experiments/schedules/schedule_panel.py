"""One pipeline schedule as a picture: a row per stage, a box per F, B and W of a micro-batch."""

import dataclasses

import numpy as np
from matplotlib.axes import Axes

from jaxscale.parallel.pipeline.schedule import Schedule, bubble, duration

TITLES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved 1F1B",
    "zero_bubble": "Zero bubble (ZB-H1)",
}
# Of the first and the second chunk of a stage.
COLORS = {
    "F": ("#3f7fd0", "#9fc4f2"),
    "B": ("#e0812b", "#f7c793"),
    "W": ("#3f9a57", "#a8d9b3"),
}
INKS = ("white", "#333333")


@dataclasses.dataclass(frozen=True)
class Box:
    """What one stage does without a pause: F, B or W of a micro-batch through a chunk."""

    kind: str
    stage: int
    chunk: int
    microbatch: int
    begin: float
    width: float


def draw(axes: Axes, schedule: Schedule) -> None:
    """Draw a schedule whose F, input gradient and weight gradient of a stage take 1 each.

    A tick, which ends with a line, lasts as long as the stage with the most work in it.
    """
    begin = 0.0
    for tick in range(schedule.num_ticks):
        boxes = _boxes(schedule, tick, begin)
        for box in boxes:
            _draw_box(axes, box)
        begin = max((box.begin + box.width for box in boxes), default=begin)
        axes.axvline(begin, color="#c4c8ce", lw=0.5, zorder=0)
    axes.axvspan(0, begin, color="#eef0f2", lw=0, zorder=-1)
    axes.set_title(_title(schedule), loc="left", fontsize=12, pad=7)
    stages = range(schedule.num_stages)
    axes.set(yticks=stages, yticklabels=[f"stage {s}" for s in stages])
    axes.set(ylim=(stages[-1] + 0.5, -0.5), xlim=(0, None))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _boxes(schedule: Schedule, tick: int, begin: float) -> list[Box]:
    """The boxes of one tick, those of a stage one after the other."""
    rows = schedule.rows
    kinds = {
        "F": (rows.forward, rows.forward_chunk),
        "B": (rows.backward, rows.backward_chunk),
        "W": (rows.weight, rows.weight_chunk),
    }
    ends = np.full(schedule.num_stages, begin)
    boxes = []
    for kind, (microbatch, chunk) in kinds.items():
        # Where W is not apart, B makes the gradients of the input and of the weights.
        work = 2 if kind == "B" and not schedule.is_split else 1
        for stage in np.flatnonzero(microbatch[tick] >= 0):
            box = Box(
                kind=kind,
                stage=stage,
                chunk=chunk[tick, stage],
                microbatch=microbatch[tick, stage],
                begin=ends[stage],
                width=work / schedule.num_chunks,
            )
            boxes.append(box)
            ends[stage] += box.width
    return boxes


def _draw_box(axes: Axes, box: Box) -> None:
    axes.broken_barh(
        [(box.begin, box.width)],
        (box.stage - 0.44, 0.88),
        color=COLORS[box.kind][box.chunk % 2],
        ec="white",
        lw=0.8,
    )
    axes.text(
        box.begin + box.width / 2,
        box.stage,
        box.microbatch,
        ha="center",
        va="center",
        color=INKS[box.chunk % 2],
        fontsize=8,
    )


def _title(schedule: Schedule) -> str:
    work = 1 / schedule.num_chunks
    idle = f"{bubble(schedule):.1%} idle"
    length = f"{duration(schedule, work, work, work):g} long"
    residuals = f"keeps {schedule.num_residual_slots} residuals"
    if schedule.num_chunks > 1:
        residuals += f" of 1/{schedule.num_chunks} stage"
    return f"{TITLES[schedule.name]}:  {idle}, {length}, {residuals}"
