"""Milliseconds of RMSNorm's backward with the residual's gradient added, by our kernels and by XLA.

python experiments/bench/rms_norm.py 16384 2048  # rows, D
python experiments/bench/rms_norm.py 16384 2048 mosaic triton
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from jaxscale.kernels.rms_norm.api import residual_norm
from jaxscale.ops.norm import rms_norm

LAYERS, ROUNDS = 20, 10
BYTES_PER_ELEMENT = 8  # x and two cotangents are read and one gradient is written, in bfloat16


def by_xla(x, scale):
    """(x, its norm) as the model has it elsewhere."""
    return x, rms_norm(x, scale, epsilon=1e-5)


def by_kernel(x, scale, implementation):
    """(x, its norm) with our backward."""
    return residual_norm(x, scale, epsilon=1e-5, implementation=implementation)


def layers(f, x, scale, dx, dy):
    """The backward of `f` again and again, each on what the last one gave."""
    _, pullback = jax.vjp(f, x, scale)
    total = jnp.zeros_like(scale)
    for _ in range(LAYERS):
        (gradient, dscale), dy = pullback((dx, dy)), dx
        # Otherwise XLA would fuse one layer's backward with the next.
        dx, total = jax.lax.optimization_barrier((gradient, total + dscale))
    return dx, total


def measure(f, *arrays):
    """(gradients, seconds of one backward in the fastest round)."""
    run = jax.jit(functools.partial(layers, f))
    step = run.lower(*arrays).compile()
    gradients = jax.block_until_ready(step(*arrays))
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(step(*arrays))
        seconds.append((time.perf_counter() - began) / LAYERS)
    return gradients, min(seconds)


def relative_error(found, expected):
    """Norm of the difference over that of the expected array."""
    difference = (found - expected).astype("float32")
    size = jnp.linalg.norm(expected.astype("float32"))
    return jnp.linalg.norm(difference) / size


def main(num_rows, dim, families):
    """One row per form."""
    keys = jax.random.split(jax.random.key(0), 4)
    size = (num_rows, dim)
    x, dx, dy = (jax.random.normal(key, size, jnp.bfloat16) for key in keys[:3])
    scale = 1 + 0.1 * jax.random.normal(keys[3], (dim,))
    first = None
    print(f"{jax.devices()[0].device_kind}, {num_rows} rows of {dim}\n")
    print("| form | ms | bytes needed / s | gradients beside the first's |\n|---|---|---|---|")
    kernels = {each: functools.partial(by_kernel, implementation=each) for each in families}
    for name, f in {"XLA": by_xla, **kernels}.items():
        gradients, seconds = measure(f, x, scale, dx, dy)
        first = first or gradients
        pairs = zip(gradients, first, strict=True)
        errors = ", ".join(f"{relative_error(*pair):.1e}" for pair in pairs)
        rate = BYTES_PER_ELEMENT * num_rows * dim / seconds / 1e12
        print(f"| {name} | {seconds * 1e3:.4f} | {rate:.2f} TB | {errors} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), sys.argv[3:] or ["mosaic"])
