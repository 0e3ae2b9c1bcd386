"""Prints where the device time of a profile goes: kernels by name, most expensive first, and what devices wait before.

python experiments/bench/profile_table.py DIRECTORY [ROWS]
"""

import collections
import re
import sys
from pathlib import Path

import jax


def device_events(directory):
    """For each GPU of the newest profile below `directory`: its (start, end, name) in order of start, nanoseconds."""
    path = max(Path(directory).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    return [
        sorted(
            (
                event.start_ns,
                event.start_ns + event.duration_ns,
                re.sub(r"[._]\d+$", "", event.name)[:100],
            )
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if "/device:GPU" in plane.name
    ]


def kernel_times(devices):
    """Nanoseconds and calls by name."""
    times, counts = collections.Counter(), collections.Counter()
    for start, end, name in (event for events in devices for event in events):
        times[name] += end - start
        counts[name] += 1
    return times, counts


def idle_times(devices):
    """Nanoseconds in which nothing ran on a device, and how often, by the name of what ran next."""
    times, counts = collections.Counter(), collections.Counter()
    for events in devices:
        busy_until = events[0][0] if events else 0
        for start, end, name in events:
            if start > busy_until:
                times[name] += start - busy_until
                counts[name] += 1
            busy_until = max(busy_until, end)
    return times, counts


def table(title, times, counts, rows):
    """The `rows` largest of `times`."""
    total = sum(times.values())
    print(f"{total / 1e6:.1f} ms {title}")
    for name, nanoseconds in times.most_common(rows):
        print(f"{nanoseconds / 1e6:9.2f} ms {nanoseconds / total:6.1%} {counts[name]:6d} x {name}")


if __name__ == "__main__":
    devices, rows = device_events(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 25
    table("of kernels", *kernel_times(devices), rows)
    table("with nothing on a device, by what came next", *idle_times(devices), rows // 2)
