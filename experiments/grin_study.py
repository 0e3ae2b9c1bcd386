"""Does GRIN's router learn better? Trains each arm from the same seeds and appends one JSON line a run.

Protocol, fixed on 2026-11-24, before any run. Arms: GShard, SparseMixer-v2, its control (v2's
sampling, GShard's gates) and the dense model of equal active parameters. A seed fixes the initial
parameters and the order of the rows, alike for all arms; no row is seen twice. The figure: held-out
loss in nats a token at the last step, over all domains, with nothing drawn. Pairs: v2 - GShard,
control - GShard, v2 - control, dense - GShard. Two one-sided t-tests over at least 5 seeds, margin
0.01 nats, level 0.05 each, not corrected for there being four pairs; "undecided" is a result. No
run is left out or repeated. experiments/draw_grin_study.py tests and draws.

Second protocol, fixed on 2026-11-24 after the first one's runs, whose seeds scattered too much, and
before its own: the same but for 1,000 steps, a lower rate that ends at 0, a threshold of 0.1 and
seeds 5 to 12: --seeds 5 6 7 8 9 10 11 12 --set train.steps=1000 --set optimizer.learning_rate=0.001
--set optimizer.warmup_steps=100 --set optimizer.final_fraction=0.0 --set model.router_threshold=0.1

P=experiments/configs/papers/grin python experiments/grin_study.py runs/study.jsonl
$P/study_{gshard,sparsemixer_v2,masked_sampling,dense}.gin
"""

import argparse
import inspect
import json
from pathlib import Path

from jaxscale import config
from jaxscale.evaluate.study import make_arm, run_seed
from jaxscale.launch.runtime import apply_runtime
from jaxscale.train.pretrain import pretrain

PARTS = ("model", "mesh", "data", "optimizer", "train", "policy", "stack")


def main():
    """Runs seed after seed, all arms of a seed in turn, so that what is there after a stop is paired."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("files", nargs="+", type=Path, help="one gin file an arm, study_NAME.gin")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    defaults = {name: each.default for name, each in inspect.signature(pretrain).parameters.items()}
    runs = {
        file.stem.removeprefix("study_"): config.load(pretrain, [file], options.set)
        for file in options.files
    }
    runs = {name: defaults | loaded.arguments for name, loaded in runs.items()}
    apply_runtime(next(iter(runs.values()))["runtime"], ".")
    arms = [make_arm(name, **{part: run[part] for part in PARTS}) for name, run in runs.items()]
    for seed in options.seeds:
        for arm in arms:
            figures = run_seed(arm, seed)
            with options.output.open("a") as file:
                file.write(json.dumps(figures) + "\n")
            print(
                f"{arm.name} seed {seed}: {figures['loss']:.4f} in {figures['seconds']:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
