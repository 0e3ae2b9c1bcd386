"""Tests and draws what experiments/grin_study.py wrote; prints the tables of the results page.

python experiments/draw_grin_study.py runs/study.jsonl
experiments/results/2026-11-24_h200_grin_study
"""

import json
import sys
from pathlib import Path

import numpy as np

from jaxscale.evaluate.routing import routing_table, shares, similarity
from jaxscale.evaluate.study import compare_arms
from jaxscale.evaluate.study_report import (
    loss_table,
    plot_loads,
    plot_losses_of_arms,
    plot_routing,
    verdict_table,
)

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


def main(file, output):
    """Pictures named `output`_*.png, tables on the terminal."""
    runs = [json.loads(line) for line in Path(file).read_text().splitlines()]
    found = compare_arms(runs, PAIRS, margin=MARGIN)
    print(loss_table(runs, NAMES), verdict_table(found, NAMES), sep="\n\n")
    for arm in [arm for arm in NAMES if arm != "dense"]:
        loads = [
            {d: np.array(each["load"]) for d, each in r["domains"].items()}
            for r in runs
            if r["arm"] == arm
        ]
        largest = max(shares(sum(each.values())).max() for each in loads)
        cosines = [similarity(each)[:, *np.triu_indices(len(each), 1)].mean() for each in loads]
        print(
            f"\n{NAMES[arm]}: largest share {largest:.1%}, mean cosine between domains {np.mean(cosines):.4f}"
        )
        print(f"first seed, layer {LAYER}:", routing_table(loads[0], LAYER), sep="\n")
    plot_losses_of_arms(runs, found, NAMES, Path(f"{output}_loss.png"), margin=MARGIN)
    plot_loads(runs, NAMES, Path(f"{output}_load.png"))
    plot_routing(runs, NAMES, Path(f"{output}_routing.png"), layer=LAYER)


if __name__ == "__main__":
    main(*sys.argv[1:])
