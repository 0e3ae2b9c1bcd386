"""Whether plans run out of memory: the best of a grid of configurations, compiled for H200s.

JAX_PLATFORMS=cpu python experiments/bench/plan_memory.py experiments/configs/runs/llama_1b.gin \\
    experiments/configs/runs/mixtral_4b.gin --count 100 --scanned --output grid.jsonl

No GPU is needed. One JSON line a plan: GiB modelled and compiled, and whether it fits an H200. Of
plans in files of earlier lines (`--known`) the compiled memory is taken from there.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import pathlib
import random
import statistics

from jaxscale.launch.ahead_of_time import described_devices, memory_of
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.explain import layout_text
from jaxscale.run.compile import lower_step, memory_share
from jaxscale.run.planned import job_of, planned, search
from jaxscale.run.run import load_run
from jaxscale.types import RunError

GIB = 2**30
LAYERS, LENGTHS = (8, 16, 48), (2048, 8192, 32768)
ROWS, DEVICES = (1, 4, 16), ("1x1", "1x2", "1x8", "2x8")


def tried(pinned, known, case):
    """The line of one configuration; what is known of its plan's memory is not compiled again."""
    layers, length, rows, devices, file = case
    cluster = Cluster.parse(f"h200:{devices}")
    sizes = f"model.num_layers={layers} model.max_length={length} data.sequence_length={length}"
    run = load_run([file], [*sizes.split(), f"data.batch_size={rows * cluster.num_devices}"])
    try:
        best = search(job_of(run), cluster, pinned, memory_share()).ranked[0]
    except RunError as error:
        return {"case": case, "refused": str(error)}
    plan, modelled = layout_text(best.layout), best.memory.total / GIB
    gib = known.get((*case, plan)) or compiled_gib(run, cluster, best.layout)
    fits = gib * GIB <= cluster.device.memory_bytes * memory_share()
    figures = {"modelled": round(modelled, 2), "compiled": round(gib, 2)}
    figures |= {"off": round(modelled / gib - 1, 3)}
    return {"case": case, "plan": plan, "fits": fits} | figures


def compiled_gib(run, cluster, layout):
    """What the step of a layout needs."""
    hosts = {"num_hosts": cluster.num_hosts, "gpus_per_host": cluster.devices_per_host}
    devices = described_devices("h200", **hosts)
    return memory_of(lower_step(planned(run, layout), devices).compile()).peak / GIB


def main():
    """Plan and compile configurations from all over the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--scanned", action="store_true", help="plans loop over layers")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--known", type=pathlib.Path, nargs="*", default=[])
    options = parser.parse_args()
    grid = [list(c) for c in itertools.product(LAYERS, LENGTHS, ROWS, DEVICES, options.files)]
    cases = random.Random(0).sample(grid, options.count)
    lines = [json.loads(line) for path in options.known for line in path.read_text().splitlines()]
    known = {(*each["case"], each["plan"]): each["compiled"] for each in lines if "plan" in each}
    pinned, lines = {"is_scanned": True} if options.scanned else {}, []
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
    with (
        concurrent.futures.ProcessPoolExecutor(options.processes, spawn) as pool,
        options.output.open("w") as file,
    ):
        left = [pool.submit(tried, pinned, known, case) for case in cases]
        for done in concurrent.futures.as_completed(left):
            lines.append(done.result())
            print(json.dumps(lines[-1]), file=file, flush=True)
            print(json.dumps(lines[-1]), flush=True)
    plans = [line for line in lines if "plan" in line]
    fits, off = sum(each["fits"] for each in plans), [abs(each["off"]) for each in plans]
    figures = {"plans": len(plans), "fit": fits, "mean_off": statistics.mean(off)}
    print(json.dumps(figures | {"refused": len(lines) - len(plans)}))


if __name__ == "__main__":
    main()
