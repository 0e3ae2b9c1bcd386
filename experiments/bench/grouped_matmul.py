"""TFLOP/s of the grouped matmul and its two gradients beside `torch._grouped_mm`, on one GPU.

python experiments/bench/grouped_matmul.py 16384 4096 6400 16  # rows, K, N, groups
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

from jaxscale.kernels.grouped_matmul.block_sizes import H200
from jaxscale.kernels.grouped_matmul.pallas import forward, weight_gradient

REPEATS, ROUNDS = 20, 5
HEADER = """\
| part | ours | torch._grouped_mm: weights by rows, by columns |
|---|---|---|"""


def group_sizes(num_rows, num_groups):
    """Random sizes that add up to all rows."""
    fractions = np.random.default_rng(0).dirichlet(np.full(num_groups, 6.0))
    sizes = np.floor(fractions * num_rows).astype(int)
    sizes[-1] += num_rows - sizes.sum()
    return sizes


def ours(shapes, sizes):
    """Part -> a function that starts it."""
    rows, weights, cotangent = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)
    )
    groups = jnp.asarray(sizes, jnp.int32)
    product = functools.partial(forward, blocks=H200)
    return {
        "forward": lambda: product((rows,), (weights,), groups, is_transposed=False),
        "input gradient": lambda: product((cotangent,), (weights,), groups, is_transposed=True),
        "weight gradient": lambda: weight_gradient(rows, cotangent, groups, blocks=H200),
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


def main(num_rows, K, N, num_groups):
    """One row per part."""
    sizes = group_sizes(num_rows, num_groups)
    shapes = (num_rows, K), (num_groups, K, N), (num_rows, N)
    flops = 2 * num_rows * K * N
    theirs = peers(shapes, sizes)
    print(f"groups of {sizes.tolist()} rows\n{HEADER}")
    for part, run in ours(shapes, sizes).items():
        of_peers = ", ".join(tflops(each, wait_for_torch, flops) for each in theirs[part])
        of_ours = tflops(run, jax.block_until_ready, flops)
        print(f"| {part} | {of_ours} | {of_peers} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
