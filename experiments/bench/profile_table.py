"""Prints where the device time of a profile goes: kernels by name, most expensive first.

python experiments/bench/profile_table.py DIRECTORY [ROWS]
"""

import collections
import re
import sys
from pathlib import Path

import jax


def kernel_times(directory):
    """Nanoseconds and calls by name in the newest profile below `directory`."""
    path = max(Path(directory).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    times, counts = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if "/device:GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    name = re.sub(r"[._]\d+$", "", event.name)[:100]
                    times[name] += event.duration_ns
                    counts[name] += 1
    return times, counts


def main(directory, rows):
    """Prints the `rows` most expensive kernels."""
    times, counts = kernel_times(directory)
    total = sum(times.values())
    print(f"{total / 1e6:.1f} ms of kernels")
    for name, nanoseconds in times.most_common(rows):
        print(f"{nanoseconds / 1e6:9.2f} ms {nanoseconds / total:6.1%} {counts[name]:6d} x {name}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 25)
