"""Test and draw what experiments/grin/run.py wrote; print the tables of the results page.

python experiments/grin/draw.py runs/study.jsonl experiments/results/2026-11-24_h200_grin_study
"""

import sys
from pathlib import Path

import numpy as np
from grin_study.pictures import plot_loads, plot_losses_of_arms, plot_routing
from grin_study.routing import shares, similarity
from grin_study.runs import compare_arms, loads_by_domain, read_runs, runs_of
from grin_study.tables import loss_table, routing_table, verdict_table

LAYER = 3  # of 6
MARGIN = 0.01  # nats a token; fixed in the protocol
NAMES = {
    "gshard": "GShard",
    "sparsemixer_v2": "SparseMixer-v2",
    "masked_sampling": "its control",
    "dense": "dense twin",
}
PAIRS = [
    ("sparsemixer_v2", "gshard"),
    ("masked_sampling", "gshard"),
    ("sparsemixer_v2", "masked_sampling"),
    ("dense", "gshard"),
]


def print_routing(runs, arm):
    """How evenly an arm uses its experts, how alike the domains are, and one layer's table."""
    loads = [loads_by_domain(run) for run in runs_of(runs, arm)]
    largest = max(shares(sum(of_run.values())).max() for of_run in loads)
    cosines = []
    for of_run in loads:
        first, second = np.triu_indices(len(of_run), 1)  # each pair of domains once
        cosines.append(similarity(of_run)[:, first, second].mean())
    mean = f"mean cosine between domains {np.mean(cosines):.4f}"
    print(f"\n{NAMES[arm]}: largest share {largest:.1%}, {mean}")
    print(f"first seed, layer {LAYER}:", routing_table(loads[0], LAYER), sep="\n")


def main(file, output):
    """Save pictures named `output`_*.png and print the tables."""
    runs = read_runs(Path(file))
    found = compare_arms(runs, PAIRS, margin=MARGIN)
    print(loss_table(runs, NAMES), verdict_table(found, NAMES), sep="\n\n")
    for arm in NAMES:
        if arm != "dense":
            print_routing(runs, arm)
    plot_losses_of_arms(runs, found, NAMES, Path(f"{output}_loss.png"), margin=MARGIN)
    plot_loads(runs, NAMES, Path(f"{output}_load.png"))
    plot_routing(runs, NAMES, Path(f"{output}_routing.png"), layer=LAYER)


if __name__ == "__main__":
    main(*sys.argv[1:])
