"""Strategies or sizes of chunks side by side: MFU, and memory on the device and the host.

Reads the lines that experiments/bench/long_strategies.py printed.

python experiments/long_bars.py experiments/results/2026-11-30_h200_chunk_sizes.jsonl OUT.png
"""

import json
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt

PANELS = {
    "MFU": lambda row: row["mfu"],
    "GiB on the device": lambda row: row["temp_gib"] + row["arguments_gib"],
    "GiB on the host": lambda row: row["host_gib"],
}


def main(measured, output):
    """One bar a row and panel; the dashed line is the cap by the rates before the steps."""
    lines = [json.loads(line) for line in Path(measured).read_text().splitlines()]
    rows = [line for line in lines if "mfu" in line]
    cap = next(line["cap"] for line in lines if "cap" in line)
    names = [textwrap.fill(row["row"], 28) for row in rows]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 0.5 * len(rows) + 0.9), sharey=True)
    for axis, (title, value) in zip(axes, PANELS.items()):
        bars = axis.barh(names, [value(row) for row in rows], color="tab:blue", height=0.6)
        axis.bar_label(
            bars, fmt="%.3f" if title == "MFU" else "%.1f", label_type="center", color="white"
        )
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(cap, color="black", linestyle="--", linewidth=1)
    axes[0].annotate(" cap", (cap, 0), xycoords=("data", "axes fraction"), va="bottom")
    axes[0].set_xlim(right=1.2 * cap)
    axes[0].invert_yaxis()
    figure.savefig(output, bbox_inches="tight", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
