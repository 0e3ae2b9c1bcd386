"""Kill one process of a run, time how the others end, and go on with half of them.

python experiments/bench/killed_process.py experiments/configs/runs/llama_1b.gin --processes 4 \\
    --set "directory='runs/killed'" --set mesh.data=4 --set data.batch_size=16 --set train.steps=30

Each process has a GPU of its own. One JSON line: exit statuses of the others (75 is the watchdog's,
-6 JAX's own) and seconds until they ended, and both of the rest of the run.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from gin_run import make_parser

from jaxscale.run.run import load_run

LIMIT_S = 300  # for a process to end


def start(options, number):
    """The processes of one run."""
    with socket.create_server(("localhost", 0)) as free:
        coordinator = f"'localhost:{free.getsockname()[1]}'"
    found = []
    for index in range(number):
        names = dict(launcher="'explicit'", coordinator=coordinator, number=number, index=index)
        settings = [f"runtime.processes.{name}={value}" for name, value in names.items()]
        words = [sys.executable, "-m", "jaxscale", "pretrain", options.file]
        words += [f"--set={each}" for each in (*options.set, "mesh.is_elastic=True", *settings)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(index)}
        found.append(subprocess.Popen(words, env=environment, stdout=sys.stderr))
    return found


def main():
    """Start all, kill the last after some steps, wait for the others, and start half."""
    parser = make_parser(__doc__)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--lines", type=int, default=15, help="of history before the kill")
    options = parser.parse_args()
    history = Path(load_run([options.file], options.set).directory) / "metrics.jsonl"
    processes = start(options, options.processes)
    while not history.exists() or len(history.read_text().splitlines()) < options.lines:
        assert all(each.poll() is None for each in processes), "a process has ended by itself"
        time.sleep(0.05)
    processes[-1].kill()
    killed, ends = time.monotonic(), [each.wait(LIMIT_S) for each in processes[:-1]]
    figures = {"statuses": ends, "ended_s": time.monotonic() - killed}
    began, rest = time.monotonic(), start(options, options.processes // 2)
    figures["statuses_of_rest"] = [each.wait(LIMIT_S) for each in rest]
    print(json.dumps(figures | {"rest_s": time.monotonic() - began}))


if __name__ == "__main__":
    main()
