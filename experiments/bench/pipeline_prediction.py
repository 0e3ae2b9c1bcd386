"""A pipeline's step beside what its table predicts from F, B and W timed alone; one JSON line.

python experiments/bench/pipeline_prediction.py experiments/configs/runs/llama_1b.gin \\
    --set mesh.pipeline=2 --set data.batch_size=32 --set train.num_microbatches=32

F is the forward of a micro-batch through a chunk of a stage, B its backward, W the gradient of the
weights where the schedule splits it from B. After the last F of the last stage every stage computes
its share of the head, waiting for the others. The engine runs any table. So the time of F of one
stage's chunk is that of a table in which the stage does it in tick after tick while the others
wait, less that of the same table without it. Such a table begins as the shortest schedule does (one
micro-batch, or as many as there are stages where they have several chunks), so that the slots hold
numbers as in training: with zeros a GPU draws less power and clocks higher. What a step takes with
an empty table (exchanges, reduction of the gradients, update) is added to the prediction. The times
of one F, B or W are printed as [chunk][stage].
"""

import dataclasses
import functools
import json
import time

import jax
import numpy as np
from gin_run import make_parser, start_run, synthetic_batch

from jaxscale.parallel.pipeline.schedule import NONE, Rows, duration, make_schedule
from jaxscale.train.step import make_step

# The columns of the table that say what F, B and W do, read and store, and F with the head.
FORWARD = ("forward", "forward_chunk", "activation_read", "residual_store")
COLUMNS = {
    "forward": FORWARD,
    "head": (*FORWARD, "cotangent_own"),
    "backward": ("backward", "backward_chunk", "residual_read", "cotangent_read"),
    "weight": ("weight", "weight_chunk", "residual_weight"),
}


class Tables:
    """Tables as long as a schedule's, in which one stage does one thing again and again."""

    def __init__(self, schedule):
        self.schedule = schedule
        shortest = shortest_num_microbatches(schedule)
        self.first = make_schedule(
            schedule.name, schedule.num_stages, schedule.num_chunks, shortest
        ).rows
        self.num_repeats = schedule.num_ticks - len(self.first.forward)

    def empty(self):
        """Nothing in any tick."""
        return jax.tree.map(lambda column: np.full_like(column, NONE), self.schedule.rows)

    def shortest(self):
        """The shortest schedule, then nothing."""
        pad = ((0, self.num_repeats), (0, 0))
        return Rows(*(np.pad(column, pad, constant_values=NONE) for column in self.first))

    def repeated(self, operation, chunk, stage):
        """The shortest schedule, then the operation in all ticks that are left."""
        chunk_column = getattr(self.first, COLUMNS[operation][1])
        tick = np.flatnonzero(chunk_column[:, stage] == chunk)[0]
        table = self.shortest()
        for name in COLUMNS[operation]:
            column = getattr(table, name)
            column[-self.num_repeats :, stage] = column[tick, stage]
        return table


class Bench:
    """A run with the state that its steps hand on."""

    def __init__(self, run, setup):
        self.setup = setup
        self.state = setup.init(seed=0)
        self.batch = synthetic_batch(run, setup.mesh)

    def compile_step(self):
        """The train step as it is."""
        return make_step(self.setup).lower(self.state, self.batch).compile()

    def compile_step_with_table(self):
        """The train step whose table is an argument, so that one program serves all tables."""
        setup, region = self.setup, self.setup.region
        schedule = region.schedule
        shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.state)

        def step_with(state, batch, rows):
            of_table = dataclasses.replace(
                region, schedule=dataclasses.replace(schedule, rows=rows)
            )
            return make_step(dataclasses.replace(setup, region=of_table))(state, batch)

        step = jax.jit(step_with, donate_argnums=0, out_shardings=(shardings, None))
        return step.lower(self.state, self.batch, schedule.rows).compile()

    def seconds(self, step, *table, num_steps):
        """Median of the timed steps, each waited for; another two come first."""
        found = []
        for _ in range(2 + num_steps):
            began = time.perf_counter()
            self.state, metrics = step(self.state, self.batch, *table)
            jax.block_until_ready((self.state, metrics))
            found.append(time.perf_counter() - began)
        return np.median(found[2:])


def shortest_num_microbatches(schedule):
    """How many micro-batches the shortest schedule of the same stages and chunks has."""
    return schedule.num_stages if schedule.num_chunks > 1 else 1


def check_schedule(parser, schedule):
    """End with a message if there is no pipeline or no tick left to repeat something in."""
    if schedule is None:
        parser.error("needs a pipeline: --set mesh.pipeline=2")
    shortest = shortest_num_microbatches(schedule)
    if schedule.num_microbatches <= shortest:
        example = f"--set train.num_microbatches={16 * shortest}"
        parser.error(f"needs more micro-batches than {shortest}: {example}")


def main():
    """Time the real step, then one step per table, and print both and the prediction."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="timed for each table")
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    setup = run.setup()
    schedule = setup.region.schedule
    check_schedule(parser, schedule)
    bench, tables = Bench(run, setup), Tables(schedule)
    timed = functools.partial(bench.seconds, num_steps=options.steps)
    real = timed(bench.compile_step())
    step = bench.compile_step_with_table()
    same_table = timed(step, schedule.rows)
    one = timed(step, tables.shortest())
    empty = timed(step, tables.empty())

    def cost(operation, chunk, stage):
        repeated = timed(step, tables.repeated(operation, chunk, stage))
        return (repeated - one) / tables.num_repeats

    chunks, stages = range(schedule.num_chunks), range(schedule.num_stages)
    costs = {}
    for operation in ("forward", "backward", "weight")[: 2 + schedule.is_split]:
        of_chunks = [[cost(operation, chunk, stage) for stage in stages] for chunk in chunks]
        costs[operation] = np.array(of_chunks)
    last = cost("head", chunks[-1], stages[-1])
    costs["head"] = last - costs["forward"][-1, -1]
    weight = costs.get("weight", 0.0)
    of_table = (costs["forward"], costs["backward"], weight, costs["head"])
    predicted = empty + duration(schedule, *of_table)
    figures = {
        "ms": real,
        "predicted_ms": predicted,
        "same_table_ms": same_table,
        "one_ms": one,
        "empty_ms": empty,
    }
    figures |= {f"{operation}_ms": each for operation, each in costs.items()}
    rounded = {name: np.round(each * 1e3, 3).tolist() for name, each in figures.items()}
    head = {
        "overrides": options.set,
        "schedule": schedule.name,
        "ratio": round(real / predicted, 4),
    }
    print(json.dumps(head | rounded))


if __name__ == "__main__":
    main()
