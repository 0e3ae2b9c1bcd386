"""Draws the four pipeline schedules: one row a stage, one column a tick, boxes as wide as their work.

python experiments/draw_schedules.py [NUM_STAGES NUM_MICROBATCHES]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from jaxscale.parallel.pipeline.schedule import Schedule, bubble, duration, make_schedule

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "schedules.png"
COLORS = {
    "F": ("#3f7fd0", "#9fc4f2"),
    "B": ("#e0812b", "#f7c793"),
    "W": ("#3f9a57", "#a8d9b3"),
}  # by chunk
WORDS = {
    "F": "F: forward",
    "B": "B: gradient of the input, and of weights if no W is drawn",
    "W": "W: of weights",
}
TITLES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved 1F1B",
    "zero_bubble": "Zero bubble (ZB-H1)",
}


def draw(axes: plt.Axes, schedule: Schedule) -> None:
    """Draws a schedule whose F, input gradient and weight gradient take 1 each; a column lasts as its longest stage."""
    rows, stages, start = schedule.rows, range(schedule.num_stages), 0.0
    kinds = {
        "F": (rows.forward, rows.forward_chunk),
        "B": (rows.backward, rows.backward_chunk),
        "W": (rows.weight, rows.weight_chunk),
    }
    for tick in range(schedule.num_ticks):
        ends = np.full(schedule.num_stages, start)
        for kind, (microbatch, chunk) in kinds.items():
            width = (2 if kind == "B" and not schedule.is_split else 1) / schedule.num_chunks
            for s in np.flatnonzero(microbatch[tick] >= 0):
                color, ink = (
                    COLORS[kind][chunk[tick, s] % 2],
                    ("white", "#333333")[chunk[tick, s] % 2],
                )
                axes.broken_barh(
                    [(ends[s], width)], (s - 0.44, 0.88), color=color, ec="white", lw=0.8
                )
                at = dict(ha="center", va="center", color=ink, fontsize=8)
                axes.text(ends[s] + width / 2, s, microbatch[tick, s], **at)
                ends[s] += width
        start = ends.max()
        axes.axvline(start, color="#c4c8ce", lw=0.5, zorder=0)
    axes.axvspan(0, start, color="#eef0f2", lw=0, zorder=-1)
    idle, length = bubble(schedule), duration(schedule, *[1 / schedule.num_chunks] * 3)
    title = f"{TITLES[schedule.name]}:  {idle:.1%} idle, {length:g} long, keeps {schedule.num_residual_slots} residuals"
    title += f" of 1/{schedule.num_chunks} stage" * (schedule.num_chunks > 1)
    axes.set_title(title, loc="left", fontsize=12, pad=7)
    axes.set(
        yticks=stages,
        yticklabels=[f"stage {s}" for s in stages],
        ylim=(stages[-1] + 0.5, -0.5),
        xlim=(0, None),
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    num_stages, num_microbatches = map(int, sys.argv[1:]) if len(sys.argv) > 1 else (4, 8)
    figure, panels = plt.subplots(4, 1, figsize=(15, 10), sharex=True, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.15)
    for axes, name in zip(panels, TITLES):
        draw(
            axes,
            make_schedule(name, num_stages, 2 if name == "interleaved" else 1, num_microbatches),
        )
    panels[-1].set_xlabel(
        "time, in forwards of one stage (a line ends each tick; the second chunk is lighter)"
    )
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=COLORS[kind][0], label=words)
        for kind, words in WORDS.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=11)
    figure.savefig(PICTURE, dpi=110)
