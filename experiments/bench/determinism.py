"""Same bits again? Runs a gin file twice, the second time stopped half-way and resumed, and compares all figures.

python experiments/bench/determinism.py experiments/configs/runs/main_job.gin bits --set
runtime.is_deterministic=True
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
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("file")
parser.add_argument("directory", type=Path)
parser.add_argument("--set", action="append", default=[])
options = parser.parse_args()


def start(directory: Path) -> subprocess.Popen:
    """The command, writing to `directory`."""
    settings = [f"directory='{directory}'", *options.set]
    sets = [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen([sys.executable, "-m", "jaxscale.cli", "pretrain", options.file, *sets])


def steps(directory: Path) -> dict[int, tuple[float, ...]]:
    """The figures of each step so far."""
    history = read_history(directory / "metrics.jsonl")
    return {
        line["step"]: tuple(line[name] for name in FIGURES) for line in history if "loss" in line
    }


whole, stopped = options.directory / "whole", options.directory / "stopped"
assert start(whole).wait() == 0
if (
    whole / "autotune.txtpb"
).exists():  # the autotuner may choose otherwise in another run; a resumed run has its own file
    stopped.mkdir(parents=True)
    shutil.copy(whole / "autotune.txtpb", stopped)
process = start(stopped)
while len(steps(stopped)) < len(steps(whole)) // 2:
    time.sleep(0.05)
process.send_signal(signal.SIGTERM)
assert process.wait() == 128 + signal.SIGTERM
num_before = len(steps(stopped))
assert start(stopped).wait() == 0
differing = [step for step, figures in steps(whole).items() if steps(stopped)[step] != figures]
print(
    f"{len(steps(whole))} steps; stopped after {num_before} and resumed; steps that differ: {differing or 'none'}"
)
sys.exit(bool(differing))
