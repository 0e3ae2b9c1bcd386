"""The main job: pretrain, stop as if preempted, resume on another mesh, plot, sample, compare.

make train        (or: python experiments/main_job.py)
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxscale.evaluate.report import compare_with_ngrams, plot_run
from jaxscale.run.run import load_run
from jaxscale.train.metrics import read_history

FILE, RUN = "experiments/configs/runs/main_job.gin", Path("runs/main_job")


def jaxscale(verb, *overrides):
    """Start `jaxscale VERB FILE --set ...` as a process of its own."""
    arguments = [verb, FILE, *(f"--set={override}" for override in overrides)]
    print("\n$ jaxscale", *arguments, flush=True)
    command = [sys.executable, "-m", "jaxscale", *arguments]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def expect(process, status):
    """Wait for a process; end the main job if its exit status is not the expected one."""
    if process.wait() != status:
        sys.exit(f"{' '.join(process.args)}: exit status {process.returncode}, expected {status}")


def set_aside(run):
    """Rename what an earlier run left there, whoever made it."""
    if run.exists():
        names = (run.with_name(f"{run.name}.{number}") for number in itertools.count(1))
        print(f"{run} is now {run.rename(next(name for name in names if not name.exists()))}")


def main():
    """Run everything from scratch."""
    set_aside(RUN)
    expect(jaxscale("tokenizer"), 0)
    run = load_run([FILE])
    first, half = jaxscale("pretrain"), run.train.steps // 2
    while first.poll() is None and len(read_history(RUN / "metrics.jsonl")) < half:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    expect(first, 128 + signal.SIGTERM)
    expect(jaxscale("pretrain", "mesh.data=4", "mesh.expert=1", "mesh.tensor=2", "mesh.zero=3"), 0)
    plot_run(RUN, held_out="held_out/loss")
    expect(jaxscale("generate"), 0)
    print(compare_with_ngrams(RUN, run.data, margin=0.05))


if __name__ == "__main__":
    main()
