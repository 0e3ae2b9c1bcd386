"""Microseconds of a product of some tokens with matrices in 4 bits, in the ways that there are.

One launch of `more_rows`; one of `pallas` for each 8 tokens; the matrices made whole, by XLA; and
matrices that are bfloat16. Layers are multiplied in turn, so that none is in a cache.

python experiments/bench/quantised_rows.py 8 9 16 32
"""

import sys
from concurrent import futures

import jax
import jax.numpy as jnp
from quantised_matmul import PRODUCTS, draw

from jaxscale.kernels import tuning
from jaxscale.kernels.quantised_matmul import more_rows, pallas, reference

LAYERS = 12
ALONE = dict(scale=None, epsilon=0.0, residual=None, is_gated=False)


def by_eights(x, matrices):
    """As many launches as there are eights of rows."""
    parts = [x[begin : begin + pallas.UNIT] for begin in range(0, len(x), pallas.UNIT)]
    found = [pallas.matmul(each, matrices, dtype=x.dtype, **ALONE) for each in parts]
    return [jnp.concatenate(each) for each in zip(*found, strict=True)]


WAYS = {
    "one launch": lambda x, matrices: more_rows.matmul(x, matrices, dtype=x.dtype),
    "a launch for 8 rows": by_eights,
    "whole, XLA": lambda x, matrices: [
        x @ reference.dequantise(*each).astype(x.dtype) for each in matrices
    ],
    "bfloat16, XLA": lambda x, matrices: [x @ each for each in matrices],
}


def compiled(way, x, layers):
    """All layers, each of which waits for the one before."""

    def run(x, layers):
        for matrices in layers:
            outputs = WAYS[way](x, matrices)
            x = x + sum(each.max() for each in outputs) * 1e-6
        return x

    return jax.jit(run).lower(x, layers).compile()


def main(numbers):
    """One row for each product and number of tokens."""
    print(f"{jax.devices()[0].device_kind}, microseconds\n")
    print(f"| matrices | tokens | {' | '.join(WAYS)} |\n|---|---|{'---|' * len(WAYS)}")
    for name in ("q, k, v", "down"):
        depth, widths = PRODUCTS[name]
        few, wide = (
            [tuple(draw(bits, depth, width) for width in widths) for _ in range(LAYERS)]
            for bits in (4, 16)
        )
        for num in numbers:
            x = jnp.ones((num, depth), jnp.bfloat16)
            given = {way: (x, wide if way.startswith("bfloat16") else few) for way in WAYS}
            with futures.ThreadPoolExecutor() as pool:
                runs = {way: pool.submit(compiled, way, *given[way]) for way in WAYS}
            rounds = [
                [tuning.milliseconds(runs[way].result(), given[way]) for way in WAYS]
                for _ in range(3)
            ]
            cells = [f"{min(each) / LAYERS * 1e3:.2f}" for each in zip(*rounds, strict=True)]
            print(f"| {name} | {num} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])))
