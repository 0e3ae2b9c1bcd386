"""Microseconds of a sparse layer of Phi-3-small over pages: the blocks that heads see, and all.

Decoding at the length that is given, and a chunk of 512 tokens of a prompt that ends there. The
rate is that of the keys and values of the blocks, by counting.

python experiments/bench/block_sparse_pages.py 65536 8  # tokens, sequences
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.kernels.paged_attention.api import paged_attention, ragged_attention
from jaxscale.kernels.paged_attention.ragged import Sequences
from jaxscale.kernels.paged_attention.seen_pages import SeenPages
from jaxscale.ops.device import is_hopper

N, K, H = 32, 8, 128
CHUNK, IN_A_ROW, ROUNDS = 512, 16, 6
LAYOUTS = {"the blocks that heads see": BlockLayout(), "all": None}
SETTINGS = dict(scale=1 / H, implementation="mosaic" if is_hopper() else "reference")


def decoding(length, num):
    """((q, k, v, layout) -> attention, q, pages of keys, of values)."""
    width = -(-length // BLOCK)
    pages = jax.random.permutation(jax.random.key(9), num * width).astype(jnp.int32)
    high = jnp.full(num, length, jnp.int32)

    def attend(q, k, v, layout):
        table = pages.reshape(num, width)
        return paged_attention(q, k, v, table, 0 * high, high, layout=layout, **SETTINGS)

    return attend, *draw((num, N, H), num * width)


def chunk(length):
    """Likewise of one prompt."""
    width, count = -(-length // BLOCK), min(CHUNK, length)
    pages = jax.random.permutation(jax.random.key(9), width).astype(jnp.int32)
    one = Sequences(*(jnp.asarray([each], jnp.int32) for each in (0, count, length - count, 0)))

    def attend(q, k, v, layout):
        return ragged_attention(q, k, v, pages, one, num_single=0, layout=layout, **SETTINGS)

    return attend, *draw((count, N, H), width)


def draw(shape, num_pages):
    """Random bfloat16."""
    shapes = (shape, *[(num_pages, BLOCK, K, H)] * 2)
    return (jax.random.normal(jax.random.key(i), s, "bfloat16") for i, s in enumerate(shapes))


def microseconds(attend, layout, q, k, v):
    """The smallest of some rounds, each of layers that take the last one's output as queries."""

    def layers(q, k, v):
        return functools.reduce(lambda q, _: attend(q, k, v, layout), range(IN_A_ROW), q)

    run, seconds = jax.jit(layers), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(run(q, k, v))
        seconds.append((time.perf_counter() - began) / IN_A_ROW)
    return min(seconds) * 1e6


def num_bytes(layout, length):
    """Of the keys and values that a decoding sequence needs."""
    ends = jnp.int32(0), jnp.int32(-(-length // BLOCK))
    counts = (SeenPages.of(layout, N // K, jnp.int32(k), ends, length - 1).count for k in range(K))
    return int(sum(counts)) * 4 * BLOCK * H


def main():
    length, num = map(int, sys.argv[1:])
    print(f"{jax.devices()[0].device_kind}, {SETTINGS['implementation']}\n")
    print("| blocks | decoding, us | TB/s | a chunk, us |\n|---|---|---|---|")
    single, (attend, *arrays) = decoding(length, num), chunk(length)
    for name, layout in LAYOUTS.items():
        us = microseconds(single[0], layout, *single[1:])
        rate = num * num_bytes(layout, length) / us / 1e6
        of_chunk = microseconds(attend, layout, *arrays)
        print(f"| {name} | {us:.1f} | {rate:.3f} | {of_chunk:.1f} |", flush=True)


if __name__ == "__main__":
    main()
