"""The largest BERT of RaNNC's width that 32 devices of 32 GB can train, by the planner's model.

python experiments/bench/largest_model.py experiments/configs/papers/rannc_bert.gin

One JSON line each for data parallelism alone, ZeRO-3 alone and any plan.
"""

import json

from gin_run import make_parser

from jaxscale.models.parameters import count_parameters
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.explain import layout_text
from jaxscale.run.planned import job_of, search
from jaxscale.run.run import load_run
from jaxscale.types import InputError, RunError

DEVICES, SHARE, STEP = "v100_32gb:4x8", 0.95, 8
ON_DEVICE = {"is_optimizer_on_host": False}
WAYS = {"data parallelism": {"data": 32, "zero": 0}, "ZeRO-3": {"data": 32, "zero": 3}, "any": {}}


def planned(file, num_layers, pinned):
    """The run with so many layers and the best layout for it; None if none fits."""
    run = load_run([file], [f"model.num_layers={num_layers}"])
    try:
        return run, search(job_of(run), Cluster.parse(DEVICES), pinned, SHARE).ranked[0].layout
    except (InputError, RunError):
        return run, None


def largest(file, pinned):
    """The largest multiple of STEP layers that fits."""
    high = 2 * STEP
    while planned(file, high, pinned)[1]:
        high *= 2
    low = high // 2
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        fits = planned(file, middle, pinned)[1]
        low, high = (middle, high) if fits else (low, middle)
    return planned(file, low, pinned)


def main():
    """Parameters, also over those of data parallelism alone."""
    options = make_parser(__doc__).parse_args()
    first = None
    for name, pinned in WAYS.items():
        run, layout = largest(options.file, pinned | ON_DEVICE)
        total, _ = count_parameters(run.model)
        first = first or total  # of data parallelism
        figures = {"layers": run.model.num_layers, "parameters": total, "times": total / first}
        print(json.dumps({"way": name, "layout": layout_text(layout)} | figures), flush=True)


if __name__ == "__main__":
    main()
