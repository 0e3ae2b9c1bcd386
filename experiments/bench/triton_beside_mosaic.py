"""Milliseconds of Triton beside our Hopper kernels and XLA: pages and the head, in one process.

Attention over pages is taken many times in a row by one program, each with the result of the one
before as its queries; the head with cross-entropy is taken forward and backward.

python experiments/bench/triton_beside_mosaic.py
"""

import functools

import jax
import jax.numpy as jnp

from jaxscale.kernels import tuning
from jaxscale.kernels.linear_cross_entropy.api import label_and_normaliser
from jaxscale.kernels.paged_attention.api import paged_attention

BACKENDS = "mosaic", "triton", "reference"
IN_A_ROW = 20


def draw(*shape):
    """Random bfloat16."""
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)


def again(f, first, *rest):
    """f(first, ...) in place of `first`, IN_A_ROW times."""
    for _ in range(IN_A_ROW):
        first = jax.lax.optimization_barrier(f(first, *rest))
    return first


def pages(q, keys, values, table, *, implementation):
    """Decoding over all of the pages of each sequence."""
    high = jnp.full(len(q), table.shape[1] * keys.shape[1], jnp.int32)
    settings = dict(scale=0.1, implementation=implementation)
    return paged_attention(q, keys, values, table, 0 * high, high, **settings)


def loss(h, head, *, implementation):
    """Loss and gradients."""

    def total(h, head):
        labels = jnp.arange(len(h), dtype=jnp.int32)
        label, normaliser = label_and_normaliser(h, head, labels, implementation=implementation)
        return (normaliser - label).sum()

    return jax.value_and_grad(total, (0, 1))(h, head)


def problems():
    """(name, function, how often in a row, arrays)."""
    for num, width in ((64, 32), (256, 20), (8, 32)):
        # Arrays of their own: what is read as keys would be in the cache as values.
        keys, values = (draw(num * width, 64, 8, 128) for _ in range(2))
        table = jnp.arange(num * width, dtype=jnp.int32).reshape(num, width)
        name = f"pages, {num} sequences of {64 * width} tokens"
        yield name, pages, IN_A_ROW, (draw(num, 32, 128), keys, values, table)
    head = 0.02 * draw(32768, 2048)
    yield "head and loss, 8192 x 2048 x 32768", loss, 1, (draw(8192, 2048), head)


def main():
    """One row for each problem, the smallest of rounds in turn."""
    print(f"{jax.devices()[0].device_kind}, milliseconds\n")
    print(f"| problem | {' | '.join(BACKENDS)} |\n|---|{'---|' * len(BACKENDS)}")
    for name, f, count, arrays in problems():
        runs = []
        for each in BACKENDS:
            run = functools.partial(f, implementation=each)
            run = functools.partial(again, run) if count > 1 else run
            runs.append(jax.jit(run).lower(*arrays).compile())
        rounds = [[tuning.milliseconds(run, arrays) / count for run in runs] for _ in range(3)]
        cells = [f"{min(each):.4f}" for each in zip(*rounds, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
