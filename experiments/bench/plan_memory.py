"""Whether plans run out of memory: the best of a grid of configurations, compiled for H200s.

JAX_PLATFORMS=cpu python experiments/bench/plan_memory.py experiments/configs/runs/llama_1b.gin \\
    experiments/configs/runs/mixtral_4b.gin --count 100

No GPU is needed. One JSON line a plan: GiB modelled and compiled, and whether an H200 has room for
it; then the mean of how far off the model is.
"""

import argparse
import itertools
import json

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


def compiled_gib(run, cluster, layout):
    hosts = {"num_hosts": cluster.num_hosts, "gpus_per_host": cluster.devices_per_host}
    devices = described_devices("h200", **hosts)
    return memory_of(lower_step(planned(run, layout), devices).compile()).peak / GIB


def main():
    """Plan and compile configurations from all over the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    grid = list(itertools.product(LAYERS, LENGTHS, ROWS, DEVICES, options.files))
    errors, limit = [], Cluster.parse("h200:1x1").device.memory_bytes * memory_share() / GIB
    for layers, length, rows, devices, file in grid[:: max(1, len(grid) // options.count)]:
        cluster = Cluster.parse(f"h200:{devices}")
        sizes = f"model.num_layers={layers} model.max_length={length} data.sequence_length={length}"
        batch = f"data.batch_size={rows * cluster.num_devices}"
        run = load_run([file], [*sizes.split(), batch])
        try:
            best = search(job_of(run), cluster, {}, memory_share()).ranked[0]
        except RunError as error:
            print(json.dumps({"file": file, "devices": devices, "refused": str(error)}))
            continue
        gib, modelled = compiled_gib(run, cluster, best.layout), best.memory.total / GIB
        errors.append(abs(modelled / gib - 1))
        text = {"file": file, "sizes": sizes, "devices": devices, "plan": layout_text(best.layout)}
        figures = {"modelled": round(modelled, 2), "compiled": round(gib, 2), "fits": gib <= limit}
        print(json.dumps(text | figures), flush=True)
    print(json.dumps({"plans": len(errors), "mean_error": round(sum(errors) / len(errors), 4)}))


if __name__ == "__main__":
    main()
