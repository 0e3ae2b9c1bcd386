"""Same bits again? Run a gin file twice, the second time stopped half-way and resumed, and compare.

python experiments/bench/determinism.py experiments/configs/runs/main_job.gin bits \\
    --set runtime.is_deterministic=True
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxscale.train.metrics import read_history

FIGURES = ("loss", "gradient_norm", "parameter_norm")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--set", action="append", default=[])
    return parser.parse_args()


def start(options, directory):
    """Start the run in `directory`, or resume it there."""
    settings = [f"directory='{directory}'", *options.set]
    command = [sys.executable, "-m", "jaxscale", "pretrain", options.file]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(command)


def expect(process, status):
    """Wait for a process; end here if its exit status is not the expected one."""
    if process.wait() != status:
        sys.exit(f"exit status {process.returncode}, expected {status}")


def figures_by_step(directory):
    """Step -> its figures so far."""
    history = read_history(directory / "metrics.jsonl")
    lines = [line for line in history if "loss" in line]
    return {line["step"]: tuple(line[name] for name in FIGURES) for line in lines}


def main():
    """Run, run again with a stop, compare; the exit status says whether a step differs."""
    options = parse_arguments()
    whole, stopped = options.directory / "whole", options.directory / "stopped"
    expect(start(options, whole), 0)
    expected = figures_by_step(whole)
    autotune = whole / "autotune.txtpb"
    if autotune.exists():
        # The autotuner may choose otherwise in another run; a resumed run has its own file.
        stopped.mkdir(parents=True)
        shutil.copy(autotune, stopped)
    process = start(options, stopped)
    while len(figures_by_step(stopped)) < len(expected) // 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    expect(process, 128 + signal.SIGTERM)
    num_before = len(figures_by_step(stopped))
    expect(start(options, stopped), 0)
    found = figures_by_step(stopped)
    differing = [step for step, figures in expected.items() if found[step] != figures]
    stop = f"stopped after {num_before} and resumed"
    print(f"{len(expected)} steps; {stop}; steps that differ: {differing or 'none'}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
