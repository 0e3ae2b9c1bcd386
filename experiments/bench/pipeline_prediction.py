r"""A pipeline's step beside what its table predicts from F, B and W timed alone; prints one JSON line.

python experiments/bench/pipeline_prediction.py experiments/configs/runs/llama_1b.gin --set
    mesh.pipeline=2 \ --set data.batch_size=32 --set train.num_microbatches=32

The engine runs any table, so F of one stage's chunk is the time of a table in which that stage does
it in tick after tick while the others wait, less that of the same table without it. Such tables
begin as the shortest schedule does (one micro-batch, or as many as there are stages where they hold
several chunks), so that the slots hold numbers as they are
in training: with zeros a GPU draws less power and clocks higher. What a step takes with an empty
table (exchanges, reduction of the gradients, update) is added to the prediction. What one takes is
printed by [chunk][stage].
"""

import argparse
import dataclasses
import inspect
import json
import time

import jax
import numpy as np

from jaxscale import config
from jaxscale.launch.runtime import apply_runtime
from jaxscale.parallel.batch import place
from jaxscale.parallel.pipeline.schedule import NONE, Rows, duration, make_schedule
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

READS_AND_STORES = {
    "forward": ("forward", "forward_chunk", "activation_read", "residual_store", "cotangent_own"),
    "backward": ("backward", "backward_chunk", "residual_read", "cotangent_read"),
    "weight": ("weight", "weight_chunk", "residual_weight"),
}
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("file")
parser.add_argument("--set", action="append", default=[])
parser.add_argument("--steps", type=int, default=10, help="timed for each table")
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
schedule, shardings = plan.region.schedule, jax.tree.map(lambda leaf: leaf.sharding, plan.state)
if schedule is None:
    parser.error("needs a pipeline: --set mesh.pipeline=2")
SHORTEST = schedule.num_stages if schedule.num_chunks > 1 else 1  # micro-batches
if schedule.num_microbatches <= SHORTEST:
    parser.error(
        f"needs more micro-batches than {SHORTEST}: --set train.num_microbatches={16 * SHORTEST}"
    )
settings = dict(specs=plan.region.specs, seed=0, trainable=run["train"].trainable)
state = init_state(run["model"], plan.optimizer, plan.state, **settings)
rows, length = run["data"].batch_size, run["data"].sequence_length
text = np.random.default_rng(0).integers(0, run["model"].vocab_size, (rows, length + 1), np.int32)
weights, positions = (
    np.ones((rows, length), np.float32),
    np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
)
batch = place(
    plan.mesh, dict(tokens=text[:, :-1], labels=text[:, 1:], weights=weights, positions=positions)
)


def step_with(state, batch, rows):
    """The train step with another table, which is an argument so that one program serves all."""
    region = dataclasses.replace(plan.region, schedule=dataclasses.replace(schedule, rows=rows))
    return make_step(plan.loss_fn, plan.optimizer, region, plan.state)(state, batch)


def seconds(step, *table):
    """Median of the timed steps, each waited for; another two come first."""
    global state
    found = []
    for _ in range(2 + options.steps):
        began = time.perf_counter()
        state, metrics = step(state, batch, *table)
        jax.block_until_ready((state, metrics))
        found.append(time.perf_counter() - began)
    return np.median(found[2:])


def table(operation=None, chunk=None, stage=None):
    """The shortest schedule, then, if there is one, the operation in all ticks that are left."""
    first = make_schedule(schedule.name, schedule.num_stages, schedule.num_chunks, SHORTEST).rows
    num = schedule.num_ticks - len(first.forward)
    found = {
        name: np.pad(each, ((0, num), (0, 0)), constant_values=NONE)
        for name, each in first._asdict().items()
    }
    for name in READS_AND_STORES[operation] if operation else ():
        tick = np.flatnonzero(getattr(first, f"{operation}_chunk")[:, stage] == chunk)[0]
        found[name][-num:, stage] = found[name][tick, stage]
    return Rows(**found), num


def cost(operation, chunk, stage):
    """Seconds of one F, B or W."""
    with_it, num = table(operation, chunk, stage)
    return (seconds(step, with_it) - one) / num


real = seconds(
    make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state).lower(state, batch).compile()
)
step = jax.jit(step_with, donate_argnums=0, out_shardings=(shardings, None))
step = step.lower(state, batch, schedule.rows).compile()
same, one = seconds(step, schedule.rows), seconds(step, table()[0])
empty = seconds(step, jax.tree.map(lambda column: np.full_like(column, NONE), schedule.rows))
chunks, stages = range(schedule.num_chunks), range(schedule.num_stages)
operations = ("forward", "backward", "weight")[: 2 + schedule.is_split]
costs = {
    name: np.array([[cost(name, chunk, stage) for stage in stages] for chunk in chunks])
    for name in operations
}
predicted = empty + duration(
    schedule, costs["forward"], costs["backward"], costs.get("weight", 0.0)
)
seconds_of = {"": real, "predicted_": predicted, "same_table_": same, "one_": one, "empty_": empty}
seconds_of |= {f"{name}_": each for name, each in costs.items()}
figures = {
    f"{name}ms": np.round(np.multiply(each, 1e3), 3).tolist() for name, each in seconds_of.items()
}
print(
    json.dumps(
        {"overrides": options.set, "schedule": schedule.name, "ratio": round(real / predicted, 4)}
        | figures
    )
)
