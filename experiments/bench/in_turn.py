"""Run the commands of a list one after another and print a table: a page of results in one call.

python experiments/bench/in_turn.py experiments/bench/two_gpus.txt --output runs/two_gpus

A line of a list is NAME | COMMAND, run by bash. Nothing runs beside anything, compilation included:
XLA chooses matmul algorithms by timing them on the GPU, and beside another program it chooses slow
ones.
"""

import argparse
import json
import os
import signal
import subprocess
import time
from pathlib import Path

COLUMNS = ("ms", "tokens_per_second", "mfu", "peak_gib", "predicted_ms", "ratio")


def parse_arguments():
    """The command line."""
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
        "--limit-s",
        type=float,
        default=3600,
        help="for all; what has no time left is left out",
    )
    return parser.parse_args()


def read_commands(path, only):
    """Name -> command of a list, or of those whose names are given."""
    commands = {}
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, command = line.split("|", 1)
            commands[name.strip()] = command.strip()
    if not only:
        return commands
    return {name: command for name, command in commands.items() if name in only}


def make_environment(output):
    """This process's environment, with this checkout's packages and one cache of compilations."""
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        **os.environ,
        "PYTHONPATH": str(Path.cwd()),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(output.absolute() / "cache"),
    }


def run(command, log, environment, timeout_s):
    """The JSON lines that a command prints into `log`; it is killed when its time is up."""
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", command],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # The whole group: the command may have started processes of its own.
            os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def table_row(name, figures):
    """The figures in their columns, "-" for those that there are not."""
    cells = [f"{figures[c]:18,.3f}" if c in figures else f"{'-':>18}" for c in COLUMNS]
    return " ".join([f"{name:24}", *cells])


def main():
    """Run all; the table and results.jsonl grow as results come."""
    options = parse_arguments()
    ends = time.monotonic() + options.limit_s
    commands = read_commands(options.list, options.only)
    options.output.mkdir(parents=True, exist_ok=True)
    environment = make_environment(options.output)
    print(" ".join([f"{'name':24}", *(f"{column:>18}" for column in COLUMNS)]))
    with (options.output / "results.jsonl").open("a") as results:
        for name, command in commands.items():
            log = options.output / f"{name}.txt"
            found = run(command, log, environment, max(ends - time.monotonic(), 0))
            for figures in found:
                results.write(json.dumps({"name": name} | figures) + "\n")
            results.flush()
            for figures in found or [{}]:
                print(table_row(name, figures), flush=True)


if __name__ == "__main__":
    main()
