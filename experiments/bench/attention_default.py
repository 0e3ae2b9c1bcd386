"""The attention that `ops.attention` chooses beside cuDNN's, forward with backward, on one GPU.

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

HEADS, KV_HEADS = 32, 8
REPEATS, ROUNDS = 10, 4
BACKENDS = (None, "cudnn")  # None: the one that is chosen


def masks(num_rows, length):
    """Name -> context, with windows and documents of a quarter of the length."""
    quarter = length // 4
    one_row = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.tile(one_row, (num_rows, 1))
    lengths = np.random.default_rng(0).exponential(quarter, 64).astype(int) + 1
    document = jnp.searchsorted(np.cumsum(lengths), one_row, side="right")
    segments = jnp.tile(document.astype(jnp.int32) + 1, (num_rows, 1))
    return {
        "causal": AttentionContext(positions),
        "all keys": AttentionContext(positions, is_causal=False),
        f"window of {quarter}": AttentionContext(positions, window=quarter),
        f"documents of mean {quarter}": AttentionContext(positions, segments),
    }


def step(do, q, k, v, *, context, implementation):
    """Output and the three gradients of its product with `do`."""

    def run(q, k, v):
        return attention(q, k, v, context, implementation=implementation)[0]

    o, pullback = jax.vjp(run, q, k, v)
    return o, *pullback(do)


def seconds(runs, arrays):
    """Of the fastest round of each run, the runs in turn; the first round compiles."""
    best = [np.inf] * len(runs)
    for _ in range(ROUNDS):
        for i, run in enumerate(runs):
            began = time.perf_counter()
            for _ in range(REPEATS):
                result = run(*arrays)
            jax.block_until_ready(result)
            best[i] = min(best[i], (time.perf_counter() - began) / REPEATS)
    return best


def main(length=4096):
    """One row per head dim, type and mask; 16,384 tokens, or one longer sequence."""
    num_rows = max(1, 16384 // length)
    contexts = masks(num_rows, length)
    shape = f"{num_rows} x {length} x {HEADS}/{KV_HEADS}"
    print(f"| {shape} | default, ms | cuDNN, ms | cuDNN / default |\n|---|---|---|---|")
    types = [*itertools.product(["bfloat16"], [64, 96, 128, 256]), ("float16", 128)]
    for (dtype, dim), (name, context) in itertools.product(types, contexts.items()):
        arrays = [
            jax.random.normal(jax.random.key(i), (num_rows, length, heads, dim), dtype)
            for i, heads in enumerate((HEADS, HEADS, KV_HEADS, KV_HEADS))
        ]
        runs = [
            jax.jit(functools.partial(step, context=context, implementation=backend))
            for backend in BACKENDS
        ]
        ours, peer = seconds(runs, arrays)
        figures = f"{ours * 1e3:.3f} | {peer * 1e3:.3f} | {peer / ours:.3f}"
        print(f"| H {dim}, {dtype}, {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
