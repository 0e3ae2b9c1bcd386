"""Runs the commands of a list one after another and prints a table: a page of results in one call.

python experiments/bench/in_turn.py experiments/bench/two_gpus.txt --output runs/two_gpus

A line of a list is NAME | COMMAND, run by bash. Nothing runs beside anything, compilation included: XLA chooses matmul
algorithms by timing them on the GPU, and beside another program it chooses slow ones.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

COLUMNS = ("ms", "tokens_per_second", "mfu", "peak_gib", "predicted_ms", "ratio")
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("list", type=Path)
parser.add_argument(
    "--output",
    type=Path,
    required=True,
    help="folder for results.jsonl and what the commands print",
)
parser.add_argument("--only", nargs="*", help="names to run; all by default")
parser.add_argument(
    "--limit-s", type=float, default=3600, help="for all; what has no time left is left out"
)
options = parser.parse_args()

ends = time.monotonic() + options.limit_s
lines = [
    line
    for line in options.list.read_text().splitlines()
    if line.strip() and not line.startswith("#")
]
commands = {
    name.strip(): command.strip() for name, command in (line.split("|", 1) for line in lines)
}
commands = {
    name: each for name, each in commands.items() if not options.only or name in options.only
}
options.output.mkdir(parents=True, exist_ok=True)
environment = dict(XLA_PYTHON_CLIENT_MEM_FRACTION="0.92") | os.environ
environment |= dict(PYTHONPATH=str(Path.cwd()), PYTHONUNBUFFERED="1")
environment |= dict(JAX_COMPILATION_CACHE_DIR=str(options.output.absolute() / "cache"))


def run(name, command):
    """The JSON lines that the command prints; it is killed when it is time."""
    with (options.output / f"{name}.txt").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", command], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait(max(ends - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
    return [
        json.loads(line) for line in Path(log.name).read_text().splitlines() if line.startswith("{")
    ]


print(f"{'name':24}", *(f"{column:>18}" for column in COLUMNS))
with (options.output / "results.jsonl").open("a") as results:
    for name, command in commands.items():
        found = run(name, command)
        results.writelines(json.dumps({"name": name} | each) + "\n" for each in found)
        results.flush()
        for each in found or [{}]:
            print(
                f"{name:24}",
                *(f"{each[c]:18,.3f}" if c in each else f"{'-':>18}" for c in COLUMNS),
                flush=True,
            )
