"""Two checkouts of jaxscale in turn: the train step of two models, and decoding beside plain JAX.

python experiments/bench/ground.py .before --output runs/ground  # --tiny tries it on a CPU

For each case one process of each checkout prepares it, the earlier checkout first, and then both
take turns. Nothing runs beside anything: XLA chooses matmul algorithms by timing them. They share a
compilation cache and with it those choices, and each has less than half of the GPU's memory.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).with_name("ground_worker.py")
ROOT = WORKER.parents[2]
STEPS = {"llama": "1.1B Llama", "mixture": "4.0B mixture"}
CASES = (*STEPS, "decode")
PLAIN = "plain JAX, unrolled"


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="the earlier checkout")
    parser.add_argument("--output", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--limit-s", type=float, default=540, help="the table of what is there then"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    return parser.parse_args()


class Worker:
    """A process of one checkout.

    Which prepares a case and then runs a round each time it is asked.
    """

    def __init__(self, side, checkout, case, options):
        self.name = f"{case} {side}"
        paths = [str(checkout.absolute()), os.environ.get("PYTHONPATH", "")]
        environment = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "JAX_COMPILATION_CACHE_DIR": str(options.output.absolute() / "cache"),
        }
        command = [sys.executable, WORKER, side, case, *["--tiny"][: options.tiny]]
        log = options.output / f"{case}_{side}.txt"
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def answer(self):
        """The next line of JSON that it prints."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name}: exit status {self.process.wait()}, see its log")

    def round(self):
        """The figures of one more round."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        """Free its memory."""
        self.process.kill()
        self.process.wait()


def run_case(case, options, found):
    """Add the figures of each round to `found`: a list of (before, after)."""
    workers = []
    try:
        for side, checkout in (("before", options.before), ("after", ROOT)):
            began = time.monotonic()
            workers.append(Worker(side, checkout, case, options))
            ready = workers[-1].answer()
            print(f"{workers[-1].name}: {time.monotonic() - began:.0f} s; {ready}", flush=True)
        for _ in range(options.rounds):
            found.append(tuple(worker.round() for worker in workers))
    finally:
        for worker in workers:
            worker.end()


def medians(rounds, *path):
    """(before, after): medians over the rounds of the figure at a path of keys."""
    sides = []
    for side in zip(*rounds, strict=True):
        values = []
        for figures in side:
            for key in path:
                figures = figures[key]
            values.append(figures)
        sides.append(statistics.median(values))
    return sides


def step_rows(results):
    """One row per model."""
    rows = [
        "| train step | before, ms | after, ms | after / before: medians, rounds | same losses |",
        "|---|---|---|---|---|",
    ]
    for case, name in STEPS.items():
        rounds = results.get(case)
        if not rounds:
            continue
        before, after = medians(rounds, "ms")
        ratios = sorted(new["ms"] / old["ms"] for old, new in rounds)
        losses = [[figures["loss"] for figures in side] for side in zip(*rounds, strict=True)]
        cells = [
            name,
            f"{before:.2f}",
            f"{after:.2f}",
            f"{after / before:.4f}, {ratios[0]:.4f} to {ratios[-1]:.4f}",
            "yes" if losses[0] == losses[1] else f"no: {losses}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def decode_rows(rounds):
    """One row per way of decoding."""
    columns = "| decoding | batch 1, tokens/s | of plain JAX | batch, requests/s | of before |"
    rows = [columns, "|---|---|---|---|---|"]
    by_name = {"before": [old["before"] for old, _ in rounds]}
    for name in rounds[0][1]:
        by_name[name] = [new[name] for _, new in rounds]

    def median(name, figure):
        return statistics.median(each[figure] for each in by_name[name])

    plain = median(PLAIN, "tokens_per_second")
    requests_before = median("before", "requests_per_second")
    for name in by_name:
        rate = median(name, "tokens_per_second")
        cells = [name, f"{rate:.1f}", f"{rate / plain:.3f}", "-", "-"]
        if name != PLAIN:
            requests = median(name, "requests_per_second")
            cells[3:] = f"{requests:.2f}", f"{requests / requests_before:.3f}"
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main():
    """Run the cases one after the other; print the tables of what was done when the time is up."""
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    results = {}

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, options.limit_s)
    try:
        for case in options.cases:
            run_case(case, options, results.setdefault(case, []))
    except TimeoutError:
        print(f"stopped after {options.limit_s:.0f} s, in {case}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    (options.output / "results.json").write_text(json.dumps(results))
    print("\n".join(["", *step_rows(results)]))
    if results.get("decode"):
        print("\n".join(["", *decode_rows(results["decode"])]))


if __name__ == "__main__":
    main()
