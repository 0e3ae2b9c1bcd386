"""Draw what a GPU computed and copied in a profiled step: a line of time for each.

Also printed is of every GPU what its exchanges with others had beside them.

python experiments/bench/overlap_picture.py DIRECTORY OUT.png [FROM TO]  # shares of the step
"""

import sys

import matplotlib.pyplot as plt
from profile_table import device_events

ROWS = {
    "attention": lambda name: "mosaic" in name,
    "between GPUs": lambda name: "nccl" in name or "MemcpyP2P" in name,
    "other kernels": lambda name: not any(kind in name for kind in ("mosaic", "nccl", "Memcpy")),
    "from the host": lambda name: "MemcpyH2D" in name,
    "to the host": lambda name: "MemcpyD2H" in name,
}


def union(spans):
    """Disjoint (start, end) in order that cover the same as `spans`."""
    found = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return found


def time_beside(spans, others):
    """Time of `spans` in which one of `others` runs too."""
    spans, others = union(spans), union(others)
    total = i = j = 0
    while i < len(spans) and j < len(others):
        (start, end), (other_start, other_end) = spans[i], others[j]
        total += max(0, min(end, other_end) - max(start, other_start))
        if end <= other_end:
            i += 1
        else:
            j += 1
    return total


def print_exchanges(number, events):
    """What a GPU's exchanges with others have beside them."""

    def spans(row):
        return [(start, end) for start, end, name in events if ROWS[row](name)]

    exchanges, attention = spans("between GPUs"), spans("attention")
    whole = sum(end - start for start, end in union(exchanges))
    beside_attention = time_beside(exchanges, attention)
    beside_any = time_beside(exchanges, attention + spans("other kernels"))
    print(
        f"GPU {number}: {whole / 1e6:.1f} ms between GPUs, beside attention "
        f"{beside_attention / 1e6:.1f}, beside no kernel {(whole - beside_any) / 1e6:.1f}"
    )


def main(directory, output, first="0", last="1"):
    """One picture, of the first device."""
    devices = device_events(directory)
    for number, events in enumerate(devices):
        print_exchanges(number, events)
    events = devices[0]
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
