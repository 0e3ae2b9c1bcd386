"""The attention that `ops.attention` chooses beside cuDNN's at the same mask, forward with backward, on one GPU.

python experiments/bench/attention_default.py [LENGTH]

The bar: never more than 2 % slower. Where the choice is cuDNN, both columns are the same program.
"""

import functools
import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.ops.attention import AttentionContext, attention

LENGTH = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
ROWS, HEADS, KV_HEADS, REPEATS, ROUNDS = max(1, 16384 // LENGTH), 32, 8, 10, 4
positions = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, 1))
ends = np.cumsum(np.random.default_rng(0).exponential(LENGTH / 4, 64).astype(int) + 1)
segments = jnp.tile(
    jnp.searchsorted(ends, jnp.arange(LENGTH), side="right").astype(jnp.int32) + 1, (ROWS, 1)
)
MASKS = {
    "causal": AttentionContext(positions),
    "all keys": AttentionContext(positions, is_causal=False),
    f"window of {LENGTH // 4}": AttentionContext(positions, window=LENGTH // 4),
    f"documents of mean {LENGTH // 4}": AttentionContext(positions, segments),
}
CASES = [
    *itertools.product(("bfloat16",), (64, 96, 128, 256), MASKS),
    *itertools.product(("float16",), (128,), MASKS),
]


def step(do, q, k, v, *, context, implementation):
    """Output and the three gradients of its product with `do`."""
    o, pullback = jax.vjp(
        lambda *a: attention(*a, context, implementation=implementation)[0], q, k, v
    )
    return o, *pullback(do)


def seconds(runs, arrays):
    """Of the fastest round of each, in turn."""
    best = [np.inf] * len(runs)
    for _ in range(ROUNDS):
        for i, run in enumerate(runs):
            began = time.perf_counter()
            for _ in range(REPEATS):
                result = run(*arrays)
            jax.block_until_ready(result)
            best[i] = min(best[i], (time.perf_counter() - began) / REPEATS)
    return best


print(
    f"| {ROWS} x {LENGTH} x {HEADS}/{KV_HEADS} | default, ms | cuDNN, ms | cuDNN / default |\n|---|---|---|---|"
)
for dtype, dim, mask in CASES:
    shapes = [(ROWS, LENGTH, n, dim) for n in (HEADS, HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]
    run = functools.partial(step, context=MASKS[mask])
    default, peer = seconds(
        [jax.jit(functools.partial(run, implementation=name)) for name in (None, "cudnn")], arrays
    )
    print(
        f"| H {dim}, {dtype}, {mask} | {default * 1e3:.3f} | {peer * 1e3:.3f} | {peer / default:.3f} |",
        flush=True,
    )
