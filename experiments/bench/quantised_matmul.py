"""Microseconds of a product of one token with matrices of Phi-3-mini: 4 and 8 bits and bfloat16.

The matrices of all layers are multiplied in turn, so that none is in a cache; one layer counts.

python experiments/bench/quantised_matmul.py
"""

import time

import jax
import jax.numpy as jnp

from jaxscale.kernels.quantised_matmul.api import matmul
from jaxscale.kernels.quantised_matmul.packing import INPUTS, OUTPUTS, WORDS

LAYERS, ROUNDS = 32, 20
PRODUCTS = {  # inputs, outputs of each matrix
    "q, k, v": (3072, (3072, 3072, 3072)),
    "o": (3072, (3072,)),
    "gate, up": (3072, (8192, 8192)),
    "down": (8192, (3072,)),
}


def draw(bits, depth, width):
    """One layer's matrix; what its numbers are does not matter for the time."""
    if bits == 16:
        return jnp.full((depth, width), 1e-2, jnp.bfloat16)
    shape = (width // OUTPUTS, depth // INPUTS)
    words = jnp.full((*shape, bits // 4, WORDS), 0x12345678, jnp.int32)
    return words, jnp.full((*shape, OUTPUTS), 1e-2, jnp.bfloat16)


def chain(bits, x, layers):
    """All layers, each of which waits for the one before."""
    for matrices in layers:
        if bits == 16:
            outputs = [x @ each for each in matrices]
        else:
            outputs = matmul(x, matrices, implementation="mosaic")
        x = x + sum(each.max() for each in outputs) * 1e-6
    return x


def microseconds(bits, depth, widths):
    """Of one layer, the mean of a round."""
    layers = [[draw(bits, depth, width) for width in widths] for _ in range(LAYERS)]
    x = jnp.ones((1, depth), jnp.bfloat16)
    run = jax.jit(chain, static_argnums=0)
    run(bits, x, layers).block_until_ready()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        y = run(bits, x, layers)
    y.block_until_ready()
    return (time.perf_counter() - began) / ROUNDS / LAYERS * 1e6


def main():
    """One row a product."""
    print("| matrices | bits | microseconds | TB/s |\n|---|---|---|---|")
    for name, (depth, widths) in PRODUCTS.items():
        for bits in (16, 8, 4):
            took = microseconds(bits, depth, widths)
            rate = depth * sum(widths) * bits / 8 / took / 1e6
            print(f"| {name} | {bits} | {took:.2f} | {rate:.2f} |", flush=True)


if __name__ == "__main__":
    main()
