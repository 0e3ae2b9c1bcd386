"""Draw the four pipeline schedules below one another, on one axis of time, as docs/schedules.png.

python experiments/schedules/draw.py [NUM_STAGES NUM_MICROBATCHES]
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from schedule_panel import COLORS, TITLES, draw

from jaxscale.parallel.pipeline.schedule import make_schedule

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "schedules.png"
LEGEND = {
    "F": "F: forward",
    "B": "B: gradient of the input, and of weights if no W is drawn",
    "W": "W: of weights",
}
TIME = "time, in forwards of one stage (a line ends each tick; the second chunk is lighter)"


def legend_handle(kind):
    """A box of the color that a kind has in a stage's first chunk."""
    color = COLORS[kind][0]
    return Rectangle((0, 0), 1, 1, color=color, label=LEGEND[kind])


def main(num_stages=4, num_microbatches=8):
    """One panel per schedule; only interleaved 1F1B has two chunks a stage."""
    figure = Figure(figsize=(15, 10), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.15)
    panels = figure.subplots(len(TITLES), 1, sharex=True)
    for axes, name in zip(panels, TITLES, strict=True):
        num_chunks = 2 if name == "interleaved" else 1
        schedule = make_schedule(name, num_stages, num_chunks, num_microbatches)
        draw(axes, schedule)
    panels[-1].set_xlabel(TIME)
    figure.legend(
        handles=[legend_handle(kind) for kind in LEGEND],
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize=11,
    )
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
