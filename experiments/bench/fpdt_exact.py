"""Loss and gradients of chunks on a GPU beside those of whole layers, in bfloat16 on one device.

python experiments/bench/fpdt_exact.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import tree
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig
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
CASES = {
    "whole again": {},
    "chunks on the device": ON_DEVICE,
    "chunks on the host": {},
    "half of the inputs on the device": dict(device_input_bytes=LENGTH * 512),
    "attention run twice": dict(attention="nowhere"),
}


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


def value_and_gradient(params, strategy=None, is_scanned=True):
    """Of the mean loss, compiled."""
    fields = {} if strategy is None else {"strategy": strategy}
    execution = ExecutionConfig(remat="none", is_scanned=is_scanned, num_loss_chunks=4, **fields)
    loss = NextTokenLoss(MODEL, Policy(), execution)
    batch = jax.tree.map(jnp.asarray, make_batch())

    def mean(params):
        total, weight, _ = loss(params, batch, None)
        return total / weight

    return jax.jit(jax.value_and_grad(mean))(params)


def main():
    """The largest relative error of a gradient, of each case."""
    params = init_params(parameter_table(MODEL), jax.random.key(0), "float32")
    value, gradient = value_and_gradient(params)
    print(
        "| case | loops | loss | error of the loss | largest of a gradient |\n|---|---|---|---|---|"
    )
    for name, fields in CASES.items():
        strategy = None if name == "whole again" else FullyPipelined(CHUNK, **fields)
        for is_scanned in (True,) if name == "whole again" else (True, False)[: 1 + (not fields)]:
            got, gradients = value_and_gradient(params, strategy, is_scanned)
            flat, wanted = tree.flatten(gradients), tree.flatten(gradient)
            errors = {
                path: float(jnp.linalg.norm(leaf - wanted[path]) / jnp.linalg.norm(wanted[path]))
                for path, leaf in flat.items()
            }
            worst = max(errors, key=errors.get)
            loss_error = abs(float(got / value) - 1)
            layers = "scanned" if is_scanned else "unrolled"
            print(
                f"| {name} | {layers} | {float(got):.5f} | {loss_error:.1e} "
                f"| {errors[worst]:.1e} {worst} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
