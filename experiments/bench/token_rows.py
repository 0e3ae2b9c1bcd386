"""Microseconds of one token's product with bfloat16 matrices, alone and with rows of zeros.

`ops.linear` puts seven rows of zeros beside the token on a GPU. Several matrices of a shape are
multiplied in turn, each product waiting for the one before, so that none is in a cache.

python experiments/bench/token_rows.py
"""

import functools
import time

import jax
import jax.numpy as jnp

from jaxscale.ops.linear import linear

MATRICES, ROUNDS = 16, 20
SHAPES = {  # of Phi-3-mini, whose decoding joins matrices of one input
    "q, k, v": (3072, 9216),
    "o": (3072, 3072),
    "gate, up": (3072, 16384),
    "down": (8192, 3072),
}


def alone(x, matrix):
    """As it is written."""
    return x @ matrix


def beside_zeros(x, matrix):
    """As a model's layer does it."""
    return linear("bd,df->bf", x, matrix)


@functools.partial(jax.jit, static_argnums=0)
def chain(multiply, x, matrices):
    """All products, each of which waits for the one before."""
    for matrix in matrices:
        x = x + multiply(x, matrix).max() * 1e-6
    return x


def microseconds(multiply, depth, width):
    """Of one product, the mean of the rounds; the small sum behind it is in it."""
    matrices = [jnp.full((depth, width), 1e-2, jnp.bfloat16) for _ in range(MATRICES)]
    x = jnp.ones((1, depth), jnp.bfloat16)
    chain(multiply, x, matrices).block_until_ready()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        y = chain(multiply, x, matrices)
    y.block_until_ready()
    return (time.perf_counter() - began) / ROUNDS / MATRICES * 1e6


def main():
    """One row a shape."""
    print(f"{jax.devices()[0].device_kind}, microseconds\n")
    print("| matrix | MB | alone | with zeros |\n|---|---|---|---|")
    for name, (depth, width) in SHAPES.items():
        took = [microseconds(each, depth, width) for each in (alone, beside_zeros)]
        cells = " | ".join(f"{each:.2f}" for each in took)
        print(f"| {name} | {2 * depth * width / 1e6:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
