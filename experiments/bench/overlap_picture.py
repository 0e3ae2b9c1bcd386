"""Draw what a GPU computed and copied in a profiled step: a line of time for each.

python experiments/bench/overlap_picture.py DIRECTORY OUT.png [FROM TO]  # shares of the step
"""

import sys

import matplotlib.pyplot as plt
from profile_table import device_events

ROWS = {
    "attention": lambda name: "mosaic" in name,
    "between GPUs": lambda name: "nccl" in name,
    "other kernels": lambda name: not any(kind in name for kind in ("mosaic", "nccl", "Memcpy")),
    "from the host": lambda name: "MemcpyH2D" in name,
    "to the host": lambda name: "MemcpyD2H" in name,
}


def main(directory, output, first="0", last="1"):
    """One picture, of the first device."""
    events = device_events(directory)[0]
    # Before its first kernel a first step pins host memory.
    began = next(start for start, _, name in events if "Memcpy" not in name)
    ended = max(end for _, end, _ in events)
    span = ended - began
    figure, axis = plt.subplots(figsize=(11, 2.4))
    for row, (label, belongs) in enumerate(ROWS.items()):
        bars = [(s - began, e - s) for s, e, name in events if belongs(name)]
        busy = sum(length for _, length in bars)
        axis.broken_barh([(s / 1e6, n / 1e6) for s, n in bars], (row, 0.8), color=f"C{row}")
        print(f"{label:<14} {busy / 1e6:9.1f} ms, {busy / span:6.1%} of {span / 1e6:.1f} ms")
    axis.set_yticks([row + 0.4 for row in range(len(ROWS))], list(ROWS))
    axis.set_xlim(float(first) * span / 1e6, float(last) * span / 1e6)
    axis.set_xlabel("ms")
    axis.invert_yaxis()
    figure.savefig(output, bbox_inches="tight", dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
