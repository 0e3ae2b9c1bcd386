"""Requests a second of several replicas, each an engine in a process and on a GPU of its own.

What `serving.py` counts begins on all of them at once; the last line is the sum of their rates.

python experiments/bench/replicas.py 2 --workloads 0
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path


def start(number, options):
    """A replica on the GPU of that number."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(number)}
    command = [sys.executable, Path(__file__).with_name("serving.py"), "--in_step", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def workloads(replica):
    """The lines of a replica's table; in between, whenever it waits for the others, None."""
    for line in replica.stdout:
        if line == "ready\n":
            yield None
        elif line.startswith("| ("):
            yield line.strip()


def main():
    num, *options = sys.argv[1:]
    with contextlib.ExitStack() as stack:
        replicas = [stack.enter_context(start(number, options)) for number in range(int(num))]
        for found in zip(*map(workloads, replicas), strict=True):
            if None in found:
                for replica in replicas:
                    replica.stdin.write("\n")
                    replica.stdin.flush()
                continue
            print(*found, sep="\n", flush=True)
            print(f"together {sum(float(line.split('|')[2]) for line in found):.2f} requests/s")
    sys.exit(max(replica.returncode for replica in replicas))


if __name__ == "__main__":
    main()
