"""Does GRIN's router learn better? Train each arm from the same seeds, one JSON line per run.

Protocol, fixed on 2026-11-24, before any run. Arms: GShard, SparseMixer-v2, its control (v2's
sampling, GShard's gates) and the dense model of equal active parameters. A seed fixes the initial
parameters and the order of the rows, alike for all arms; no row is seen twice. The figure: held-out
loss in nats a token at the last step, over all domains, with nothing drawn. Pairs: v2 - GShard,
control - GShard, v2 - control, dense - GShard. Two one-sided t-tests over at least 5 seeds, margin
0.01 nats, level 0.05 each, not corrected for there being four pairs; "undecided" is a result. No
run is left out or repeated. experiments/grin/draw.py tests and draws.

Second protocol, fixed on 2026-11-24 after the first one's runs, whose seeds scattered too much, and
before its own: the same but for 1,000 steps, a lower rate that ends at 0, a threshold of 0.1 and
seeds 5 to 12: --seeds 5 6 7 8 9 10 11 12 --set train.steps=1000 --set optimizer.learning_rate=0.001
--set optimizer.warmup_steps=100 --set optimizer.final_fraction=0.0; and for the two arms that have
a threshold, in a call of their own, --set model.pattern.0.feed_forward.router.threshold=0.1

P=experiments/configs/papers/grin
python experiments/grin/run.py runs/study.jsonl \\
    $P/study_{gshard,sparsemixer_v2,masked_sampling,dense}.gin
"""

import argparse
import json
from pathlib import Path

from grin_study.arms import make_arm, run_seed

from jaxscale.launch.runtime import apply_runtime
from jaxscale.run.run import load_run


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="JSON lines; the runs are appended")
    parser.add_argument("files", nargs="+", type=Path, help="one gin file an arm, study_NAME.gin")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--set", action="append", default=[], help="an override of all gin files")
    return parser.parse_args()


def main():
    """Run all arms of a seed before the next seed, so that what is there after a stop is paired."""
    options = parse_arguments()
    runs = {
        file.stem.removeprefix("study_"): load_run([file], options.set) for file in options.files
    }
    first_run = next(iter(runs.values()))
    apply_runtime(first_run.runtime, ".")
    arms = [make_arm(name, run) for name, run in runs.items()]
    for seed in options.seeds:
        for arm in arms:
            figures = run_seed(arm, seed)
            with options.output.open("a") as file:
                file.write(json.dumps(figures) + "\n")
            loss, seconds = figures["loss"], figures["seconds"]
            print(f"{arm.name} seed {seed}: {loss:.4f} in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
