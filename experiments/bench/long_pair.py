"""Time a step in chunks and in whole layers, attention kept, by turns in one process.

python experiments/bench/long_pair.py experiments/configs/papers/fpdt_8b.gin \\
    --set model.num_layers=1
"""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

from gin_run import make_parser, start_run, synthetic_batch
from long_step import cap
from train_step import compiled_step, peak_gib, rates, time_steps

from jaxscale.models.execution import Whole


def prepared(run):
    """The compiled step of a run, with the first state and a batch to give it."""
    setup = run.setup()
    state, batch = setup.init(seed=0), synthetic_batch(run, setup.mesh)
    step, figures = compiled_step(setup, state, batch)
    return step, state, batch, figures["temp_gib"]


def main():
    """Compile both at once, run each once, then time them in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    kept = dict(strategy=Whole(), remat="names", saved_names=("attention",))
    whole = dataclasses.replace(run, execution=dataclasses.replace(run.execution, **kept))
    with ThreadPoolExecutor() as pool:
        coming = pool.map(prepared, (run, whole))
        figures, states = cap(run), {}
        both = dict(zip(("chunks", "whole"), coming))
    for name, (step, state, batch, temp_gib) in both.items():
        states[name], metrics = step(state, batch)
        figures |= {f"{name}_loss": float(metrics["loss"]), f"{name}_temp_gib": temp_gib}
    times = {name: [] for name in both}
    for _ in range(options.steps):
        for name, (step, _, batch, _) in both.items():
            ms, states[name] = time_steps(step, states[name], batch, 1)
            times[name].append(ms)
    for name, found in times.items():
        ms = sum(found) / len(found)
        figures |= {f"{name}_ms": ms, f"{name}_mfu": rates(run, ms)["mfu"]}
    figures["ratio"] = figures["whole_ms"] / figures["chunks_ms"]
    figures["peak_gib"] = peak_gib()
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"overrides": options.set} | rounded), flush=True)


if __name__ == "__main__":
    main()
