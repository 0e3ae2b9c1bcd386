"""Loss and gradients of layers in chunks on one GPU beside those of whole layers, in bfloat16.

python experiments/bench/fpdt_exact.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import tree
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig, Whole
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined

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


def value_and_gradient(params, strategy=Whole(), compute="bfloat16"):
    """Of the mean loss, compiled."""
    execution = ExecutionConfig(remat="none", is_scanned=True, num_loss_chunks=4, strategy=strategy)
    loss = NextTokenLoss(MODEL, Policy(compute=compute), execution)
    batch = jax.tree.map(jnp.asarray, make_batch())

    def mean(params):
        total, weight, _ = loss(params, batch, None)
        return total / weight

    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    return float(value), tree.flatten(gradient)


def main():
    """The largest relative error of a gradient, of each case, beside float32."""
    params = init_params(parameter_table(MODEL), jax.random.key(0), "float32")
    wanted_value, wanted = value_and_gradient(params, compute="float32")
    kind = jax.devices()[0].device_kind
    print(f"{kind}, {LENGTH} tokens in chunks of {CHUNK}\n", flush=True)
    print("| case | loss | its error | largest error of a gradient |\n" + "|---" * 4 + "|")
    for name, strategy in CASES:
        value, gradient = value_and_gradient(params, strategy)
        errors = {
            path: float(jnp.linalg.norm(gradient[path] - leaf) / jnp.linalg.norm(leaf))
            for path, leaf in wanted.items()
        }
        worst = max(errors, key=errors.get)
        of_loss = abs(value / wanted_value - 1)
        line = f"| {name} | {value:.5f} | {of_loss:.1e} | {errors[worst]:.1e} {worst} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
