"""TFLOP/s of the grouped matmul and its two gradients beside `torch._grouped_mm`, on one GPU.

python experiments/bench/grouped_matmul.py 16384 4096 6400 16  # rows, K, N, groups
python experiments/bench/grouped_matmul.py 16384 4096 6400 16 triton mosaic xla
"""

import functools
import os
import sys
import time

import numpy as np

# JAX would otherwise take most of the GPU's memory, and the peer in this process needs some too.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxscale.kernels.grouped_matmul import pallas
from jaxscale.kernels.grouped_matmul.block_sizes import H200

REPEATS, ROUNDS = 20, 5


def group_sizes(num_rows, num_groups):
    """Random sizes that add up to all rows."""
    fractions = np.random.default_rng(0).dirichlet(np.full(num_groups, 6.0))
    sizes = np.floor(fractions * num_rows).astype(int)
    sizes[-1] += num_rows - sizes.sum()
    return sizes


def kernels(family):
    """The products of our kernels in one language, or of XLA."""
    if family == "xla":

        def multiply(lefts, rights, groups, is_transposed):
            right = jnp.swapaxes(rights[0], 1, 2) if is_transposed else rights[0]
            return lax.ragged_dot(lefts[0], right, groups)

        def transpose(rows, cotangent, groups):
            weights = jnp.zeros((len(groups), rows.shape[1], cotangent.shape[1]), rows.dtype)
            _, pullback = jax.vjp(lambda w: lax.ragged_dot(rows, w, groups), weights)
            return pullback(cotangent)

        return jax.jit(multiply, static_argnames="is_transposed"), jax.jit(transpose)
    if family == "triton":
        from jaxscale.kernels.grouped_matmul import triton

        product = jax.jit(triton.forward, static_argnames="is_transposed")
        return product, jax.jit(triton.weight_gradient)
    product = functools.partial(pallas.forward, blocks=H200)
    return product, functools.partial(pallas.weight_gradient, blocks=H200)


def ours(shapes, sizes, family):
    """Part -> a function that starts it."""
    rows, weights, cotangent = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)
    )
    groups = jnp.asarray(sizes, jnp.int32)
    product, gradient = kernels(family)
    return {
        "forward": lambda: product((rows,), (weights,), groups, is_transposed=False),
        "input gradient": lambda: product((cotangent,), (weights,), groups, is_transposed=True),
        "weight gradient": lambda: gradient(rows, cotangent, groups),
    }


def peers(shapes, sizes):
    """Part -> functions that start it, for each way in which the weights may lie in memory."""
    x, w, y = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    w_by_columns = w.transpose(1, 2).contiguous().transpose(1, 2)
    ends = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)

    def product(a, b):
        return lambda: torch._grouped_mm(a, b, ends)

    return {
        "forward": [product(x, each) for each in (w, w_by_columns)],
        "input gradient": [product(y, each.transpose(1, 2)) for each in (w, w_by_columns)],
        "weight gradient": [product(x.t(), y)],
    }


def tflops(run, wait, flops):
    """Of the fastest round, as text; the first round is not counted."""
    seconds = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            result = run()
        wait(result)
        seconds.append((time.perf_counter() - began) / REPEATS)
    return f"{flops / min(seconds[1:]) / 1e12:.0f}"


def wait_for_torch(result):
    """Wait for all that runs on the GPU."""
    torch.cuda.synchronize()


def main(num_rows, K, N, num_groups, families):
    """One row per part."""
    sizes = group_sizes(num_rows, num_groups)
    shapes = (num_rows, K), (num_groups, K, N), (num_rows, N)
    flops = 2 * num_rows * K * N
    theirs = peers(shapes, sizes)
    parts = {family: ours(shapes, sizes, family) for family in families}
    shape = f"{num_rows} rows, K {K}, N {N}"
    print(f"{jax.devices()[0].device_kind}, TFLOP/s, {shape}, groups of {sizes.tolist()} rows\n")
    names = *families, "torch._grouped_mm: weights by rows, by columns"
    print(f"| part | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for part, runs in theirs.items():
        cells = [tflops(parts[name][part], jax.block_until_ready, flops) for name in families]
        cells.append(", ".join(tflops(each, wait_for_torch, flops) for each in runs))
        print(f"| {part} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), sys.argv[5:] or ["mosaic"])
