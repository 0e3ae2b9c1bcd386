"""Loss and gradients of layers in chunks beside those of whole layers, in bfloat16.

All GPUs there are divide the sequence; the whole layers in float32 that errors are relative to are
on one. An error is the largest of RUNS runs: an exchange that did not wait for what it sends would
not err in each.

python experiments/bench/fpdt_exact.py
"""

import math

import jax
import numpy as np

from jaxscale import tree
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig, Whole
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.layout import Chunked
from jaxscale.train.config import TrainConfig
from jaxscale.train.setup import make_region

MODEL = from_flat(
    vocab_size=1024,
    num_layers=3,
    model_dim=512,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    ffn_dim=1024,
    max_length=8192,
)
LENGTH, CHUNK = 8192, 2048
RUNS = 5
ON_DEVICE = dict(inputs="device", attention="device", chunks="device")
CASES = (
    ("attention run twice", FullyPipelined(CHUNK, attention="nowhere")),
    ("whole", Whole()),
    ("chunks on the device", FullyPipelined(CHUNK, **ON_DEVICE)),
    ("chunks on the host", FullyPipelined(CHUNK)),
    ("keys on the device", FullyPipelined(CHUNK, chunks="device")),
    ("half the inputs on the host", FullyPipelined(CHUNK, device_input_bytes=LENGTH * 512)),
)


def make_batch():
    """Random tokens in documents of random length."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 1024, (1, LENGTH + 1), np.int32)
    starts = rng.random((1, LENGTH)) < 1 / 1500
    segments = 1 + np.cumsum(starts, 1, dtype=np.int32)
    first = np.maximum.accumulate(np.where(starts, np.arange(LENGTH), 0), 1)
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "weights": rng.random((1, LENGTH)).astype(np.float32),
        "segments": segments,
        "positions": (np.arange(LENGTH) - first).astype(np.int32),
    }


def gradient_of(strategy=Whole(), compute="bfloat16", num_gpus=1):
    """params -> (mean loss, its gradient by path), compiled."""
    mesh, policy = MeshConfig(sequence=num_gpus), Policy(compute=compute)
    is_cut = num_gpus > 1 and isinstance(strategy, FullyPipelined)
    region = make_region(
        table=parameter_table(MODEL),
        mesh=mesh,
        train=TrainConfig(steps=1),
        policy=policy,
        token_layout=Chunked(CHUNK) if is_cut else None,
        devices=jax.devices()[:num_gpus],
    )
    execution = ExecutionConfig(remat="none", is_scanned=True, num_loss_chunks=4, strategy=strategy)
    compiled = jax.jit(region.gradient(NextTokenLoss(MODEL, policy, execution)))
    batch, key = make_batch(), jax.random.key(1)

    def run(params):
        (total, weight, _), gradient = compiled(params, batch, key)
        mean = {path: np.asarray(g / weight) for path, g in tree.flatten(gradient).items()}
        return float(total / weight), mean

    return run


def errors_of(found, wanted):
    """(error of the loss, largest of a gradient, its path), relative."""
    (value, gradient), (wanted_value, wanted_gradient) = found, wanted
    errors = {
        path: float(np.linalg.norm(gradient[path] - leaf) / np.linalg.norm(leaf))
        for path, leaf in wanted_gradient.items()
    }
    # What is no number is worse than any.
    worst = max(errors, key=lambda path: (math.isnan(errors[path]), errors[path]))
    return abs(value / wanted_value - 1), errors[worst], worst


def main():
    """The largest relative errors of each case, beside float32 on one GPU."""
    params = init_params(parameter_table(MODEL), jax.random.key(0), "float32")
    wanted = gradient_of(compute="float32")(params)
    kind, num_gpus = jax.devices()[0].device_kind, jax.device_count()
    print(f"{num_gpus} x {kind}, {LENGTH} tokens in chunks of {CHUNK}\n", flush=True)
    print("| case | error of the loss | largest of a gradient |\n" + "|---" * 3 + "|")
    for name, strategy in CASES:
        run = gradient_of(strategy, num_gpus=num_gpus)
        found = [errors_of(run(params), wanted) for _ in range(RUNS)]
        of_losses, of_gradients, paths = zip(*found, strict=True)
        of_loss, of_gradient = np.max(of_losses), np.max(of_gradients)
        path = paths[np.argmax(of_gradients)]
        print(f"| {name} | {of_loss:.1e} | {of_gradient:.1e} {path} |", flush=True)


if __name__ == "__main__":
    main()
