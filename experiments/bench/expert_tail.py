"""Milliseconds of experts whose buffers have unused rows, which are zeros or left undefined.

python experiments/bench/expert_tail.py
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.kernels.grouped_matmul import swiglu
from jaxscale.kernels.grouped_matmul.api import feed_forward

EXPERTS, WIDE, NARROW = 4, 2048, 3200  # of a device, and their D and F
SIZES = (8000, 8500, 8100, 8168)  # rows of each expert


def milliseconds(f, *arguments, calls=10):
    """Median of three rounds."""
    f = jax.jit(f)
    jax.block_until_ready(f(*arguments))
    found = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            result = f(*arguments)
        jax.block_until_ready(result)
        found.append((time.perf_counter() - began) / calls * 1e3)
    return np.median(found)


def both_ways(needs_tail, x, dy, *weights):
    """The output and all gradients."""
    run = functools.partial(
        feed_forward,
        group_sizes=jnp.array(SIZES, jnp.int32),
        implementation="mosaic",
        needs_tail=needs_tail,
    )
    y, pullback = jax.vjp(run, x, *weights)
    return y, pullback(dy)


def main():
    """Print a row for each size of the buffers."""
    keys = jax.random.split(jax.random.key(0), 5)
    wide = (EXPERTS, WIDE, NARROW)
    shapes = (wide, wide, (EXPERTS, NARROW, WIDE))
    weights = [jax.random.normal(key, shape, "bfloat16") for key, shape in zip(keys, shapes)]
    used = sum(SIZES)
    print("| rows | of them used | zeros | undefined | SwiGLU's gradient by XLA | by the kernel |")
    print("|---|---|---|---|---|---|")
    for num_rows in (used, 2 * used, 4 * used):
        x, dy = (jax.random.normal(key, (num_rows, WIDE), "bfloat16") for key in keys[3:])
        times = []
        for needs_tail in (True, False):
            f = functools.partial(both_ways, needs_tail)
            times.append(milliseconds(f, x, dy, *weights))
        g = jnp.tile(x, (1, 2))[:, :NARROW]
        times.append(milliseconds(swiglu.backward, g, g, g))
        times.append(milliseconds(swiglu.backward_of_some, g, g, g, jnp.int32(used)))
        print(f"| {num_rows} | {used} |", " | ".join(f"{ms:.3f}" for ms in times), "|", flush=True)


if __name__ == "__main__":
    main()
