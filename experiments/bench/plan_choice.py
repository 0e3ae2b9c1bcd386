"""Steps of a list's meshes beside what the planner foretells, and how near its choice is.

python experiments/bench/plan_choice.py experiments/bench/planner_two_gpus.txt dense

The list is one of `in_turn.py`, of which the lines run whose names begin with one of the groups.
All run in one process, which spares them most of XLA's choosing of matmul algorithms, and are
compiled side by side before the first runs; XLA itself times algorithms one after the other. One
JSON line a mesh, then what the planner chooses and the share of the fastest mesh's rate that it
has.
With `--foretell` nothing runs and no GPU is needed. On one device there is nothing to choose, nor
among steps of several models, batches or lengths.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import time

import jax
from gin_run import devices, start_run, synthetic_batch
from in_turn import read_lines
from train_step import GIB, time_steps

from jaxscale.planner.calibration import measured
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.explain import layout_text
from jaxscale.planner.search import Planner
from jaxscale.run.compile import memory_share
from jaxscale.run.job import job_of, layout_of
from jaxscale.run.planned import search
from jaxscale.train.step import make_step


def run_of(command):
    """The run of a command of the list."""
    words = shlex.split(command)
    file = next(word for word in words if word.endswith(".gin"))
    return start_run(file, [value for flag, value in itertools.pairwise(words) if flag == "--set"])


def foretold(run, clusters):
    """Milliseconds by each of some clusters' figures, and GiB, of a run as it is spread."""
    found = {
        name: Planner(job_of(run), cluster, float("inf")).estimate(layout_of(run))
        for name, cluster in clusters.items()
    }
    milliseconds = {name: each.time.total * 1e3 for name, each in found.items()}
    return milliseconds | {"modelled_gib": found["table"].memory.total / GIB}


def compiled_steps(runs):
    """(setup, batch, future of the compiled step) of each run."""
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    found = {}
    for name, run in runs.items():
        setup = run.setup()
        batch = synthetic_batch(run, setup.mesh)
        step = make_step(setup).lower(setup.state, batch)
        found[name] = setup, batch, pool.submit(step.compile)
    concurrent.futures.wait([step for _, _, step in found.values()])
    return found


def trained(setup, batch, step, num_steps):
    """What the steps of a run take and need."""
    began, step = time.perf_counter(), step.result()
    state, _ = step(setup.init(seed=0), batch)
    _, state = time_steps(step, state, batch, 1)
    milliseconds, state = time_steps(step, state, batch, num_steps)
    jax.tree.map(lambda leaf: leaf.delete(), (state, batch))
    memory = step.memory_analysis()
    gib = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / GIB
    return {"ms": milliseconds, "gib": gib, "seconds": time.perf_counter() - began}


def main():
    """Foretell, run and compare the meshes of some groups."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("list", type=pathlib.Path)
    parser.add_argument("groups", nargs="+")
    parser.add_argument("--devices", default="h200:1x2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit_s", type=float, default=float("inf"), help="to begin a mesh in")
    parser.add_argument("--foretell", action="store_true")
    options = parser.parse_args()
    began, milliseconds, kind = time.perf_counter(), {}, "table" if options.foretell else "ms"
    groups = tuple(options.groups)
    lines = [each for each in read_lines(options.list) if each.name.startswith(groups)]
    runs = {line.name: run_of(line.command) for line in lines}
    table = Cluster.parse(options.devices)
    clusters = {"table": table}
    if not options.foretell:
        here = measured(table.device, jax.devices())
        clusters["calibrated"] = dataclasses.replace(table, device=here)
        print(json.dumps(devices() | dataclasses.asdict(here)), flush=True)
        steps = compiled_steps(runs)
        print(json.dumps({"compiled_s": round(time.perf_counter() - began, 1)}), flush=True)
    for name, run in runs.items():
        figures = foretold(run, clusters)
        if not options.foretell and time.perf_counter() - began < options.limit_s:
            figures |= trained(*steps[name], options.steps)
            figures["off"] = figures["table"] / figures["ms"] - 1
        rounded = {key: round(value, 3) for key, value in figures.items()}
        print(json.dumps({"name": name} | rounded), flush=True)
        if kind in figures:
            milliseconds[layout_text(layout_of(run))] = figures[kind]
    jobs = {(job.model, job.batch_size, job.length) for job in map(job_of, runs.values())}
    if table.num_devices == 1 or len(jobs) > 1:
        return
    best = search(job_of(run), table, {}, memory_share()).ranked[0]
    chosen = layout_text(best.layout)
    if chosen in milliseconds:
        share = min(milliseconds.values()) / milliseconds[chosen]
        print(json.dumps({"chosen": chosen, "share_of_fastest": round(share, 4)}))


if __name__ == "__main__":
    main()
