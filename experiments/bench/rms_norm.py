"""Milliseconds of RMSNorm's backward with the residual's gradient added, by our kernel and as XLA makes it.

python experiments/bench/rms_norm.py 16384 2048  # rows, D
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from jaxscale.kernels.rms_norm.api import residual_norm
from jaxscale.ops.norm import rms_norm

LAYERS, ROUNDS = 20, 10
ROWS, D = map(int, sys.argv[1:])
keys = jax.random.split(jax.random.key(0), 4)
x, dx, dy = (jax.random.normal(key, (ROWS, D), jnp.bfloat16) for key in keys[:3])
scale = 1 + 0.1 * jax.random.normal(keys[3], (D,))


def by_xla(x, scale):
    """(x, its norm) as the model has it elsewhere."""
    return x, rms_norm(x, scale, epsilon=1e-5)


by_kernel = functools.partial(residual_norm, epsilon=1e-5, implementation="mosaic")


def layers(f, x, scale, dx, dy):
    """The backward of `f` again and again, each on what the last one gave."""
    pullback, total = jax.vjp(f, x, scale)[1], jnp.zeros_like(scale)
    for _ in range(LAYERS):
        (gradient, dscale), dy = pullback((dx, dy)), dx
        dx, total = jax.lax.optimization_barrier((gradient, total + dscale))
    return dx, total


first = None
print("| form | ms | bytes needed / s | gradients beside the first's |\n|---|---|---|---|")
for name, f in (("XLA", by_xla), ("kernel", by_kernel)):
    step = jax.jit(functools.partial(layers, f)).lower(x, scale, dx, dy).compile()
    gradients, seconds = jax.block_until_ready(step(x, scale, dx, dy)), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(step(x, scale, dx, dy))
        seconds.append((time.perf_counter() - began) / LAYERS)
    first = first or gradients
    errors = [
        jnp.linalg.norm((a - b).astype("float32")) / jnp.linalg.norm(b.astype("float32"))
        for a, b in zip(gradients, first, strict=True)
    ]
    rate = 8 * ROWS * D / min(seconds) / 1e12
    print(
        f"| {name} | {min(seconds) * 1e3:.4f} | {rate:.2f} TB | {', '.join(f'{e:.1e}' for e in errors)} |"
    )
