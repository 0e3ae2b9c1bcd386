"""Pictures of what mup.py and longrope.py wrote, beside their JSON files.

python experiments/phi3/draw.py experiments/results/2026-11-29_mup.json
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def draw_mup(record):
    """Held-out loss over the learning rate, a curve for each width."""
    names = [name for name in ("muP", "standard") if record.get(name)]
    size = (4.5 * len(names), 3.6)
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for width, found in record[name].items():
            label = f"width {width}, best {found['best_rate']:.4f}"
            axis.plot(record["rates"], found["losses"], "o-", label=label)
        axis.set(title=name, xlabel="learning rate")
        axis.set_xscale("log", base=2)
        axis.legend()
    lowest = min(min(found["losses"]) for found in record["muP"].values())
    axes[0, 0].set(ylabel="held-out nats a byte", ylim=(lowest - 0.05, lowest + 0.8))
    return figure


def draw_longrope(record):
    """Held-out loss by position, a curve for each scaling."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, found in record.items():
        if isinstance(found, dict):
            positions = (np.arange(len(found["curve"])) + 0.5) * record["bin"]
            axis.plot(positions, found["curve"], label=name)
    axis.axvline(record["short"], color="gray", linewidth=0.8)
    axis.set(xlabel="position", ylabel="held-out nats a byte")
    axis.legend()
    return figure


def main(path):
    """Writes a PNG of the file's name."""
    record = json.loads(Path(path).read_text())
    figure = (draw_mup if "rates" in record else draw_longrope)(record)
    figure.tight_layout()
    figure.savefig(Path(path).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(sys.argv[1])
