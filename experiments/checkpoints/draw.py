"""The loss-continuity matrix as one figure: all resumed curves over the uninterrupted ones.

python experiments/checkpoints/draw.py /tmp/continuity experiments/results/NAME.png
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    files = sorted(Path(sys.argv[1]).glob("*.json"))
    figure, rows = plt.subplots(2, len(files), figsize=(4 * len(files), 6), squeeze=False)
    for file, (above, below) in zip(files, rows.T):
        result = json.loads(file.read_text())
        whole, curves = np.array(result["whole"]), result["curves"]
        before = len(whole) - len(next(iter(curves.values())))
        steps = np.arange(before + 1, len(whole) + 1)
        above.set_title(f"{file.stem.replace('_', ', ')}: {len(curves)} cells")
        for losses in curves.values():
            above.plot(steps, losses, linewidth=0.5, alpha=0.5)
            errors = np.abs(np.array(losses) / whole[before:] - 1)
            below.semilogy(steps, np.maximum(errors, 1e-17), linewidth=0.5, alpha=0.5)
        above.plot(np.arange(1, len(whole) + 1), whole, "k:", label="one device, uninterrupted")
        above.axvline(before, color="gray", linewidth=0.5)
        above.legend(fontsize=7)
        below.set_xlabel("step")
    rows[0, 0].set_ylabel("loss")
    rows[1, 0].set_ylabel("relative error of the loss")
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
