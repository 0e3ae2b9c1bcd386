"""The largest BERT of RaNNC's width that 32 devices of 32 GB can train, by compiling its step.

JAX_PLATFORMS=cpu python experiments/bench/largest_model.py \\
    experiments/configs/papers/rannc_bert.gin --way any

The devices are described H200s of which only 32 GB are used. The layout is the one that needs least
by the planner's model, with moments on the devices and layers in a loop. Depths around the largest
that the model thinks possible are compiled: one JSON line each, the largest that fits last.
"""

import dataclasses
import json

from gin_run import make_parser

from jaxscale.launch.ahead_of_time import described_devices, memory_of
from jaxscale.models.parameters import count_parameters
from jaxscale.planner.cluster import DEVICES, Cluster
from jaxscale.planner.explain import layout_text
from jaxscale.planner.search import Planner
from jaxscale.run.compile import lower_step
from jaxscale.run.planned import job_of, planned
from jaxscale.run.run import load_run

STEP = 8  # layers
MEMORY = DEVICES["v100_32gb"].memory_bytes
CLUSTER = Cluster(dataclasses.replace(DEVICES["h200"], memory_bytes=MEMORY), 4, 8)
LIMIT = 0.95 * MEMORY
GIVEN = {"is_optimizer_on_host": False, "is_scanned": True}
WAYS = {"data": {"data": 32, "zero": 0}, "zero3": {"data": 32, "zero": 3}, "any": {}}


def smallest(file, num_layers, pinned):
    """The run with so many layers, and the plan that needs the least memory by the model."""
    run = load_run([file], [f"model.num_layers={num_layers}"])
    return run, Planner(job_of(run), CLUSTER, 0.0).search(pinned | GIVEN).ranked[0]


def line(file, num_layers, pinned):
    """One depth, compiled."""
    run, plan = smallest(file, num_layers, pinned)
    devices = described_devices("h200", num_hosts=4, gpus_per_host=8)
    peak = memory_of(lower_step(planned(run, plan.layout), devices).compile()).peak
    total, _ = count_parameters(run.table())
    sizes = {"modelled": plan.memory.total / 2**30, "compiled": peak / 2**30}
    text = {"layers": num_layers, "parameters": total, "layout": layout_text(plan.layout)}
    return text | sizes | {"fits": peak <= LIMIT}


def main():
    """Bisect between depths of which the smaller one should fit and the larger one should not."""
    parser = make_parser(__doc__)
    parser.add_argument("--way", choices=WAYS, required=True)
    options = parser.parse_args()
    pinned, modelled = WAYS[options.way], STEP
    while smallest(options.file, modelled + modelled // 4, pinned)[1].memory.total <= LIMIT:
        modelled += modelled // 4
    low, high = modelled * 3 // 4 // STEP * STEP, (modelled * 3 // 2 // STEP + 1) * STEP
    found = {}
    while high - low > max(STEP, modelled // 16):
        middle = (low + high) // 2 // STEP * STEP
        found[middle] = line(options.file, middle, pinned)
        print(json.dumps({"way": options.way} | found[middle]), flush=True)
        low, high = (middle, high) if found[middle]["fits"] else (low, middle)
    print(json.dumps({"way": options.way, "largest": found.get(low)}))


if __name__ == "__main__":
    main()
