"""Time a step on one long sequence by strategy and size of chunks, all in one process.

The rows are those of `long_ladder.py`. All are compiled at once; then each runs one step and is
timed. Rates of attention's kernel and of a large matmul are taken before the steps and after them.

python experiments/bench/long_strategies.py experiments/configs/papers/fpdt_8b.gin \\
    --set model.num_layers=2 --chunks 65536 --only "attention kept" "chunks"
"""

import contextlib
import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor

import jax
from gin_run import devices, make_parser, start_run, synthetic_batch
from long_ladder import execution_of, ladder
from long_step import cap, mfu_of_paper, profiled
from profile_table import device_events
from train_step import compiled_step, peak_gib, rates, time_steps


def rows_of(chunks, words):
    """Name -> fields of the execution, where a word is in the name, in the order of the words."""
    rows = {}
    for word in words:
        for chunk in chunks:
            for name, fields in ladder(chunk).items():
                size = f", of {chunk}" if name.startswith("chunks") else ""
                rows |= {name + size: fields} if word in name else {}
    return rows


def compiled(run, state, batch, fields):
    """(compiled step, what it takes) of a run with other fields of the execution."""
    other = dataclasses.replace(run, execution=execution_of(run, fields))
    return compiled_step(other.setup(), state, batch)


def show(row, figures):
    """One line of rounded figures."""
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"row": row} | rounded), flush=True)


def main():
    """One line per row, each as soon as it is there."""
    parser = make_parser(__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[65_536])
    parser.add_argument("--only", nargs="+", default=[""], help="words of the rows; else all")
    parser.add_argument("--profile", help="directory for a profile of the first row's timed step")
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    rows = rows_of(options.chunks, options.only)
    print(json.dumps({"file": options.file, "overrides": options.set} | devices()), flush=True)
    setup = run.setup()
    state, batch = setup.init(seed=0), synthetic_batch(run, setup.mesh)
    with ThreadPoolExecutor() as pool:
        steps = list(pool.map(functools.partial(compiled, run, state, batch), rows.values()))
    show("rates before", cap(run))
    for name, (step, figures) in zip(rows, steps, strict=True):
        state, metrics = step(state, batch)
        figures["loss"] = float(metrics["loss"])
        directory = options.profile if name == next(iter(rows)) else None
        with jax.profiler.trace(directory) if directory else contextlib.nullcontext():
            ms, state = time_steps(step, state, batch, 1)
        if directory:
            figures |= {"idle": profiled(device_events(directory))["idle"]}
        host_gib = step.memory_analysis().host_temp_size_in_bytes / 2**30
        figures |= {"host_gib": host_gib, "ms": ms, "mfu_of_paper": mfu_of_paper(run, ms)}
        show(name, figures | rates(run, ms))
    show("rates after", cap(run) | {"peak_gib": peak_gib()})


if __name__ == "__main__":
    main()
