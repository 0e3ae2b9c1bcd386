"""Where the device time of a profile goes: the longest kernels, and what devices wait for.

python experiments/bench/profile_table.py DIRECTORY [ROWS]
"""

import collections
import re
import sys
from pathlib import Path

import jax


def device_events(directory):
    """For each GPU of the newest profile below `directory`: (start, end, name), sorted by start.

    Times are nanoseconds; names lack the number that XLA appends to them.
    """
    paths = Path(directory).rglob("*.xplane.pb")
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    planes = jax.profiler.ProfileData.from_file(str(newest)).planes
    return [_events(plane) for plane in planes if "/device:GPU" in plane.name]


def _events(plane):
    events = []
    for line in plane.lines:
        if line.name.startswith("Stream"):
            for event in line.events:
                name = re.sub(r"[._]\d+$", "", event.name)[:100]
                end = event.start_ns + event.duration_ns
                events.append((event.start_ns, end, name))
    return sorted(events)


def kernel_times(devices):
    """Nanoseconds and calls by name."""
    times, counts = collections.Counter(), collections.Counter()
    for events in devices:
        for start, end, name in events:
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


def print_table(title, times, counts, num_rows):
    """Print the largest of `times`."""
    total = sum(times.values())
    print(f"{total / 1e6:.1f} ms {title}")
    for name, nanoseconds in times.most_common(num_rows):
        ms, share = nanoseconds / 1e6, nanoseconds / total
        print(f"{ms:9.2f} ms {share:6.1%} {counts[name]:6d} x {name}")


def main(directory, num_rows=25):
    """Print both tables."""
    devices, num_rows = device_events(directory), int(num_rows)
    print_table("of kernels", *kernel_times(devices), num_rows)
    title = "with nothing on a device, by what came next"
    print_table(title, *idle_times(devices), num_rows // 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
