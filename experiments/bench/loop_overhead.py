"""What the training loop adds to the bare jitted step: data, placing, reporting; nothing is saved.

python experiments/bench/loop_overhead.py experiments/configs/runs/main_job.gin
"""

import argparse
import dataclasses
import functools
import inspect
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax

from jaxscale import config
from jaxscale.data.loader import make_loader
from jaxscale.launch.preemption import Preemption
from jaxscale.launch.runtime import apply_runtime
from jaxscale.launch.watchdog import Watchdog
from jaxscale.parallel.batch import place
from jaxscale.train.loop import Loop
from jaxscale.train.metrics import History, ProgressBar, Speed, TensorBoard
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain
from jaxscale.train.profiler import Profiler
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("file")
parser.add_argument("--set", action="append", default=[])
parser.add_argument("--steps", type=int, default=20, help="in a round")
parser.add_argument(
    "--rounds", type=int, default=10, help="of the bare step and of the loop, in turn"
)
options = parser.parse_args()
defaults = {name: each.default for name, each in inspect.signature(pretrain).parameters.items()}
run = defaults | config.load(pretrain, [options.file], options.set).arguments
apply_runtime(run["runtime"], ".")
plan = make_plan(
    **{
        name: run[name]
        for name in ("model", "mesh", "data", "optimizer", "train", "policy", "stack")
    }
)
settings = dict(specs=plan.region.specs, seed=0, trainable=run["train"].trainable)
held = {"state": init_state(run["model"], plan.optimizer, plan.state, **settings)}
step_fn, loader = (
    make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state),
    make_loader(run["data"]),
)
put = functools.partial(place, plan.mesh)
saver = SimpleNamespace(
    save=lambda step, state, data, force=False: held.update(state=state), wait=lambda: None
)
folder = Path(tempfile.mkdtemp())
reporters = [History(folder / "metrics.jsonl", 0), TensorBoard(folder, 0), ProgressBar(10**6, 0)]
loop = Loop(
    step_fn=step_fn,
    loader=loader,
    place=put,
    steps=0,
    checkpoints=saver,
    save_every=10**6,
    reporters=reporters,
    speed=Speed(1, 1.0),
    evaluate=lambda params, step: {},
    evaluate_every=10**6,
    diagnose=str,
    preemption=Preemption(),
    profiler=Profiler(None, folder),
    watchdog=Watchdog(None),
)
times = {"bare": [], "loop": []}
for _ in range(options.rounds + 1):
    began, batch = time.perf_counter(), put(next(loader))
    for _ in range(options.steps):
        held["state"], _ = step_fn(held["state"], batch)
    times["bare"].append((jax.block_until_ready(held["state"]), time.perf_counter() - began)[1])
    began = time.perf_counter()
    dataclasses.replace(loop, steps=int(held["state"].step) + options.steps).run(held["state"])
    times["loop"].append((jax.block_until_ready(held["state"]), time.perf_counter() - began)[1])
bare, looped = (
    min(each[1:]) / options.steps * 1e3 for each in times.values()
)  # the first round compiles
print(
    json.dumps(
        {
            "bare_ms": bare,
            "loop_ms": looped,
            "overhead_ms": looped - bare,
            "overhead": looped / bare - 1,
        }
    )
)
