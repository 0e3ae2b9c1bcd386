"""What the training loop adds to the jitted step: data, placing, reporting. Nothing is saved.

python experiments/bench/loop_overhead.py experiments/configs/runs/main_job.gin
"""

import dataclasses
import functools
import json
import tempfile
import time
from pathlib import Path

import jax
from gin_run import make_parser, start_run

from jaxscale.data.loader import make_loader
from jaxscale.launch.preemption import Preemption
from jaxscale.launch.watchdog import Watchdog
from jaxscale.parallel.batch import place
from jaxscale.train.loop import Loop
from jaxscale.train.metrics import History, Speed
from jaxscale.train.profiler import Profiler
from jaxscale.train.reporters import EventFile
from jaxscale.train.step import make_step
from jaxscale.train.terminal import make_progress

NEVER = 10**6  # steps; more than are run


class Keeper:
    """Instead of checkpoints: keeps the state that the loop would save."""

    def __init__(self, state):
        self.state = state

    def save(self, step, state, data, force=False):
        """Called by the loop at its end."""
        self.state = state

    def wait(self):
        """Nothing is under way."""


def make_loop(step_fn, loader, put, keeper):
    """The loop of `pretrain` with its reporters, which evaluates and saves nothing."""
    folder = Path(tempfile.mkdtemp())
    reporters = [
        History(folder / "metrics.jsonl", 0),
        EventFile(folder, 0),
        make_progress(NEVER, 0),
    ]
    return Loop(
        step_fn=step_fn,
        loader=loader,
        place=put,
        steps=0,
        checkpoints=keeper,
        save_every=NEVER,
        reporters=reporters,
        speed=Speed(1, 1.0),
        evaluate=lambda params, step: {},
        evaluate_every=NEVER,
        diagnose=str,
        preemption=Preemption(),
        profiler=Profiler(None, folder),
        watchdog=Watchdog(None),
    )


def run_bare(step_fn, loader, put, keeper, num_steps):
    """Run the step again and again on one batch."""
    batch = put(next(loader))
    for _ in range(num_steps):
        keeper.state, _ = step_fn(keeper.state, batch)


def run_loop(loop, keeper, num_steps):
    """Run the loop, which keeps its last state."""
    last_step = int(keeper.state.step) + num_steps
    dataclasses.replace(loop, steps=last_step).run(keeper.state)


def seconds(run, keeper):
    """Of a run, its last state included."""
    began = time.perf_counter()
    run()
    jax.block_until_ready(keeper.state)
    return time.perf_counter() - began


def main():
    """Time both in turn and print the fastest round of each; the first round compiles."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--rounds", type=int, default=10, help="of the step and the loop, in turn")
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    setup = run.setup()
    keeper = Keeper(setup.init(seed=0))
    step_fn = make_step(setup)
    loader, put = make_loader(run.data), functools.partial(place, setup.mesh)
    loop = make_loop(step_fn, loader, put, keeper)
    bare = functools.partial(run_bare, step_fn, loader, put, keeper, options.steps)
    looped = functools.partial(run_loop, loop, keeper, options.steps)
    times = [(seconds(bare, keeper), seconds(looped, keeper)) for _ in range(1 + options.rounds)]
    of_bare, of_loop = zip(*times[1:], strict=True)
    bare_ms = min(of_bare) / options.steps * 1e3
    loop_ms = min(of_loop) / options.steps * 1e3
    figures = {
        "bare_ms": bare_ms,
        "loop_ms": loop_ms,
        "overhead_ms": loop_ms - bare_ms,
        "overhead": loop_ms / bare_ms - 1,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
