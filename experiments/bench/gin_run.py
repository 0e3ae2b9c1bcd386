"""What the benchmarks of a train step share: the command line, the run of a gin file, its batch."""

import argparse

import jax
import numpy as np

from jaxscale.launch.runtime import apply_runtime
from jaxscale.parallel.batch import batch_share, place
from jaxscale.run.run import load_run


def make_parser(description):
    """A command line with the gin file and its overrides."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--set", action="append", default=[])
    return parser


def devices():
    """What the figures are of, for their line."""
    return {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


def start_run(file, overrides):
    """The run of a gin file; its runtime is applied to this process."""
    run = load_run([file], overrides)
    apply_runtime(run.runtime, ".")
    return run


def synthetic_batch(run, mesh, num_documents=None):
    """Random tokens on the mesh, in rows without padding; of so many packed documents if given."""
    rows, length = run.data.batch_size, run.data.sequence_length
    vocab_size = run.model.vocab_size
    text = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), np.int32)
    slots = np.arange(length, dtype=np.int32)
    each = -(-length // (num_documents or 1))  # tokens of a document
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "positions": np.tile(slots % each, (rows, 1)),
    }
    if num_documents is not None:
        batch["segments"] = np.tile(slots // each + 1, (rows, 1))
    index, count = batch_share(mesh)  # of this process
    share = rows // count
    here = slice(index * share, (index + 1) * share)
    return place(mesh, {name: values[here] for name, values in batch.items()})
