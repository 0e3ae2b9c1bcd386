"""Times the real train step of a gin file on synthetic tokens and prints one JSON line; nothing is read or saved.

python experiments/bench/train_step.py experiments/configs/runs/llama_1b.gin --set
stack.is_scanned=True
"""

import argparse
import inspect
import json
import time

import jax
import numpy as np

from jaxscale import config
from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.config import training_flops_per_token
from jaxscale.models.parameters import count_parameters
from jaxscale.parallel.batch import place
from jaxscale.train.metrics import peak_flops
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("file")
parser.add_argument("--set", action="append", default=[])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--profile", help="directory for a profile of the last two steps")
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
state = init_state(run["model"], plan.optimizer, plan.state, **settings)
rows, length = run["data"].batch_size, run["data"].sequence_length
text = np.random.default_rng(0).integers(0, run["model"].vocab_size, (rows, length + 1), np.int32)
weights, positions = (
    np.ones((rows, length), np.float32),
    np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
)
batch = dict(tokens=text[:, :-1], labels=text[:, 1:], weights=weights, positions=positions)
batch, began = place(plan.mesh, batch), time.perf_counter()
step = (
    make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state).lower(state, batch).compile()
)
memory, gib = step.memory_analysis(), 2**30
figures = {"compile_s": time.perf_counter() - began, "temp_gib": memory.temp_size_in_bytes / gib}
figures |= {
    "arguments_gib": memory.argument_size_in_bytes / gib,
    "host_gib": memory.host_argument_size_in_bytes / gib,
}
for _ in range(3):
    state, metrics = step(state, batch)
figures["loss_of_step_3"] = float(metrics["loss"])
began = time.perf_counter()
for _ in range(options.steps):  # dispatched without waiting, as the training loop does
    state, metrics = step(state, batch)
jax.block_until_ready(state)
figures["ms"] = (time.perf_counter() - began) / options.steps * 1e3
if options.profile:
    with jax.profiler.trace(options.profile):
        jax.block_until_ready([(state := step(state, batch)[0]) for _ in range(2)][-1])
flops = (
    training_flops_per_token(run["model"], count_parameters(run["model"])[1], length)
    * rows
    * length
)
figures |= {
    "tokens_per_second": rows * length / figures["ms"] * 1e3,
    "tflops": flops / figures["ms"] / 1e9,
}
figures |= {"mfu": figures["tflops"] * 1e12 / ((peak_flops() or np.inf) * jax.device_count())}
figures |= {
    "peak_gib": max(
        (d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()
    )
    / gib
}
print(
    json.dumps(
        {"overrides": options.set} | {name: round(value, 4) for name, value in figures.items()}
    )
)
