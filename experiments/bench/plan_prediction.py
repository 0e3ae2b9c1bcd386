"""The best plan of a gin file for one device, trained: its time and memory beside the planner's.

python experiments/bench/plan_prediction.py experiments/configs/runs/llama_1b.gin --device h200

One JSON line: milliseconds by the device table, by what was calibrated, by measured layers and as
trained on synthetic tokens; GiB modelled, as compiled and as the device counts them. The step comes
first: in a process that had timed layers it took 263 and 270 ms instead of 215.
"""

import dataclasses
import json
import time

import jax
from gin_run import make_parser, start_run, synthetic_batch
from train_step import GIB, WARMUP_STEPS, compiled_step, peak_gib, time_steps

from jaxscale.planner.calibration import measured
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.explain import layout_text
from jaxscale.planner.layer_scale import MeasuredLayers
from jaxscale.planner.layer_time import LayerClock
from jaxscale.planner.search import Planner
from jaxscale.planner.timing import BlockTimes
from jaxscale.run.compile import memory_share
from jaxscale.run.planned import job_of, planned, search


def predictions(job, table, best):
    """(milliseconds of a candidate by each of the planner's providers, seconds they took)."""
    began, device = time.perf_counter(), jax.local_devices()[0]
    here = dataclasses.replace(table, device=measured(table.device, [device]))
    scale = MeasuredLayers(job, BlockTimes(device), LayerClock(job, here))
    by_layers = Planner(job, here, float("inf"), scale).estimate(best.layout)
    calibrated = Planner(job, here, float("inf")).estimate(best.layout)
    found = {"table": best, "calibrated": calibrated, "layers": by_layers}
    milliseconds = {name: each.time.total * 1e3 for name, each in found.items()}
    return milliseconds, time.perf_counter() - began


def trained(run, num_steps):
    """What the steps of a run take and need."""
    setup = run.setup()
    state, batch = setup.init(seed=0), synthetic_batch(run, setup.mesh)
    step, compiled = compiled_step(setup, state, batch)
    for _ in range(WARMUP_STEPS):
        state, _ = step(state, batch)
    milliseconds, state = time_steps(step, state, batch, num_steps)
    return {
        "ms": milliseconds,
        "compiled_gib": compiled["temp_gib"] + compiled["arguments_gib"],
        "peak_gib": peak_gib(),
    }


def main():
    """Plan, train, measure layers."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="h200")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    job, table = job_of(run), Cluster.parse(f"{options.device}:1x1")
    best = search(job, table, {}, memory_share()).ranked[0]
    figures = trained(planned(run, best.layout), options.steps)
    milliseconds, seconds = predictions(job, table, best)
    off = {f"{name}_off": each / figures["ms"] - 1 for name, each in milliseconds.items()}
    modelled = best.memory.total / GIB
    figures |= milliseconds | off | {"modelled_gib": modelled, "measuring_s": seconds}
    figures |= {"gib_off": modelled / figures["compiled_gib"] - 1}
    head = {"file": options.file, "overrides": options.set, "plan": layout_text(best.layout)}
    print(json.dumps(head | {name: round(each, 4) for name, each in figures.items()}))


if __name__ == "__main__":
    main()
