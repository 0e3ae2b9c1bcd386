"""TFLOP/s of attention, ours beside cuDNN's in one process on one GPU; useful FLOPs are those of pairs that are seen.

python experiments/bench/attention.py
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout

SHAPES = (
    (4, 4096, 32, 8, 128),
    (1, 32768, 32, 8, 128),
    (4, 4096, 32, 32, 128),
    (8, 4096, 32, 32, 64),
)  # B, T, N, K, H
REPEATS, ROUNDS, TILE = 10, 3, 128


def seconds(f, *arrays):
    """Of the fastest round."""
    run, best = jax.jit(f), np.inf
    jax.block_until_ready(run(*arrays))
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            result = run(*arrays)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - began) / REPEATS)
    return best


def ours(q, k, v, low, high, layout):
    """Our kernel."""
    settings = dict(scale=q.shape[-1] ** -0.5, layout=layout, implementation="mosaic")
    return attention(q, k, v, low, high, **settings)[0]


def cudnn(q, k, v, low, high, layout):
    """cuDNN, causal."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def with_gradients(f):
    """Output and the three gradients of their product with `do`."""
    return lambda do, q, k, v, *bounds: (lambda o, pull: (o, *pull(do)))(
        *jax.vjp(lambda *a: f(*a, *bounds), q, k, v)
    )


def masks(length):
    """(name, first key that each token sees, block-sparse layout, pairs that are seen, tiles that are visited)."""
    token, last = np.arange(length), np.arange(length // TILE) + 1

    def interval(name, first):
        return name, first, None, (token + 1 - first).sum(), (last - first[::TILE] // TILE).sum()

    yield interval("causal", np.zeros(length, int))
    if length > 8192:
        lengths = np.random.default_rng(0).exponential(4096, length // 512).astype(int) + 1
        ends = np.cumsum(lengths)
        yield interval(
            "documents of mean 4096", (ends - lengths)[np.searchsorted(ends, token, side="right")]
        )
        yield interval("window of 2048", np.maximum(token - 2047, 0))
        blocks = BlockLayout().sees(length // BLOCK).sum() / BlockLayout().stride
        pairs = BLOCK**2 * blocks - length // BLOCK * (BLOCK * (BLOCK - 1) // 2)
        yield "blocks of Phi-3-small", np.zeros(length, int), BlockLayout(), pairs, blocks / 4


print(
    "| shape, mask | backend | TFLOP/s forward, with backward | ms | rate by visited tiles |\n|---|---|---|---|---|"
)
for batch, length, heads, kv_heads, dim in SHAPES:
    shapes = [(batch, length, n, dim) for n in (heads, heads, kv_heads, kv_heads)]
    do, q, k, v = (
        jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes)
    )
    dense = None
    for name, first, layout, pairs, visited in masks(length):
        bounds = [jnp.asarray(x[None], jnp.int32) for x in (first, np.arange(length) + 1)]
        flops = 4 * dim * batch * heads * pairs / 1e12
        for f in (ours, cudnn) if name == "causal" else (ours,):
            run = functools.partial(f, layout=layout)
            times = (
                seconds(run, q, k, v, *bounds),
                seconds(with_gradients(run), do, q, k, v, *bounds),
            )
            rates = [visited / t for t in times]
            dense = dense or rates
            figures = [flops / times[0], 3.5 * flops / times[1], *(t * 1e3 for t in times)]
            figures += [a / b for a, b in zip(rates, dense, strict=True)]
            row = "{:.0f}, {:.0f} | {:.2f}, {:.2f} | {:.2f}, {:.2f}".format(*figures)
            print(
                f"| {batch}x{length}x{heads}/{kv_heads}x{dim} {name} | {f.__name__} | {row} |",
                flush=True,
            )
