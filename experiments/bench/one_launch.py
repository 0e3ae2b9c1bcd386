"""Microseconds of a mixed step's attention, a layer of the 1.1B shape: one launch beside two.

The two are the kernel over single tokens, and the gathered pages of prompts under theirs, joined.

python experiments/bench/one_launch.py 1264 330 1200 900 1100 560  # context, how many; prompts
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.ops.attention import AttentionContext, pages
from jaxscale.ops.attention import paged_kernels as kernels
from jaxscale.ops.attention.paged_cache import PagedCache, RaggedRows

N, K, H, SIZE = 16, 8, 128, 64
LAYERS, ROUNDS = 8, 4


def two_launches(q, context, cache, rows):
    """Attention of q [T, N, H] as two kernels compute it."""
    settings = dict(family="mosaic", is_invariant=False)
    single = kernels.over_table(q, context, cache, rows, **settings)
    k, v = (pages.read(each, rows.prompt_pages, q.dtype) for each in (cache.k, cache.v))
    of_prompts = kernels.over_prompts(q[None], k, v, context, rows, **settings)[0]
    return jnp.concatenate([single, of_prompts[len(single) :]])


def draw(context, num, prompts):
    """(q, context, cache, rows): sequences around a context that decode, and whole prompts."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(context, 0.3 * context, num), 8, 2 * context).astype(int)
    per = -(-np.concatenate([lengths, prompts]) // SIZE)
    owned = np.split(1 + rng.permutation(per.sum()), per.cumsum()[:-1])
    table = np.zeros((num, per[:num].max()))
    for row, numbers in zip(table, owned[:num], strict=True):
        row[: len(numbers)] = numbers
    positions = np.concatenate([lengths - 1, *map(np.arange, prompts)])
    numbered = np.arange(1, len(prompts) + 1)
    segments = np.concatenate([np.zeros(num), np.repeat(numbered, prompts)])
    margin = (0, -len(positions) % SIZE)
    firsts = np.concatenate([[0, 0], per[num:].cumsum()[:-1]])
    listed, owners = np.concatenate(owned[num:]), np.repeat(numbered, per[num:])
    fields = (positions * 0, table, np.pad(segments, margin), listed, owners, firsts)
    rows = RaggedRows(*(jnp.asarray(each, jnp.int32) for each in fields))
    positions = jnp.asarray(np.pad(positions, margin, constant_values=-1), jnp.int32)
    shapes = (len(positions), N, H), *[(per.sum() + 1, SIZE, K, H)] * 2
    q, k, v = (jax.random.normal(jax.random.key(i), s, "bfloat16") for i, s in enumerate(shapes))
    return q, AttentionContext(positions[None]), PagedCache(k, v), rows


def main():
    """The smallest of some rounds, each of layers that take the last one's output as queries."""
    context, num, *prompts = map(int, sys.argv[1:])
    q, *rest = draw(context, num, prompts)
    outputs = []
    for name, f in (("one launch", kernels.over_all), ("two launches", two_launches)):
        run = jax.jit(
            lambda q, *rest, f=f: functools.reduce(lambda q, _: f(q, *rest), range(LAYERS), q)
        )
        outputs.append(jax.block_until_ready(jax.jit(f)(q, *rest)).astype("float32"))
        seconds = []
        jax.block_until_ready(run(q, *rest))
        for _ in range(ROUNDS):
            began = time.perf_counter()
            jax.block_until_ready(run(q, *rest))
            seconds.append((time.perf_counter() - began) / LAYERS)
        print(f"{name}: {min(seconds) * 1e6:.0f} us")
    one, two = outputs
    print(f"relative difference {jnp.linalg.norm(one - two) / jnp.linalg.norm(two):.1e}")


if __name__ == "__main__":
    main()
