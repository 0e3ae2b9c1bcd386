"""What the benchmarks of a train step share: the run of a gin file, its plan, state and batch."""

import argparse
import inspect

import numpy as np

from jaxscale import config
from jaxscale.launch.runtime import apply_runtime
from jaxscale.parallel.batch import place
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain
from jaxscale.train.state import init_state

PARTS = ("model", "mesh", "data", "optimizer", "train", "policy", "stack")


def make_parser(description):
    """A command line with the gin file and its overrides."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--set", action="append", default=[])
    return parser


def load_run(file, overrides):
    """The arguments of `pretrain`, defaults included; the runtime is applied."""
    signature = inspect.signature(pretrain).parameters
    defaults = {name: parameter.default for name, parameter in signature.items()}
    run = defaults | config.load(pretrain, [file], overrides).arguments
    apply_runtime(run["runtime"], ".")
    return run


def plan_of(run):
    """The plan of a run."""
    return make_plan(**{name: run[name] for name in PARTS})


def draw_state(run, plan):
    """The initial state on the plan's mesh."""
    return init_state(
        run["model"],
        plan.optimizer,
        plan.state,
        specs=plan.region.specs,
        seed=0,
        trainable=run["train"].trainable,
    )


def synthetic_batch(run, mesh):
    """Random tokens on the mesh, in rows without padding."""
    rows, length = run["data"].batch_size, run["data"].sequence_length
    vocab_size = run["model"].vocab_size
    text = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), np.int32)
    positions = np.arange(length, dtype=np.int32)
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "positions": np.tile(positions, (rows, 1)),
    }
    return place(mesh, batch)
