"""TFLOP/s of the grouped matmul and its two gradients beside `torch._grouped_mm`, in one process on one GPU.

python experiments/bench/grouped_matmul.py 16384 4096 6400 16  # rows, K, N, groups
"""

import os
import sys
import time

import numpy as np

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the peer needs memory too
import jax
import jax.numpy as jnp
import torch

from jaxscale.kernels.grouped_matmul.block_sizes import H200
from jaxscale.kernels.grouped_matmul.pallas import forward, weight_gradient

REPEATS, ROUNDS = 20, 5
R, K, N, E = map(int, sys.argv[1:])
sizes = np.floor(np.random.default_rng(0).dirichlet(np.full(E, 6.0)) * R).astype(int)
sizes[-1] += R - sizes.sum()
shapes = (R, K), (E, K, N), (R, N)
rows, weights, cotangent = (
    jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes)
)
groups = jnp.asarray(sizes, jnp.int32)
x, w, y = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
w_by_columns = w.transpose(1, 2).contiguous().transpose(1, 2)
ends = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)


def tflops(run, wait) -> str:
    """Of the fastest round, the first not counted."""
    seconds = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            result = run()
        wait(result)
        seconds.append(time.perf_counter() - began)
    return f"{2 * R * K * N * REPEATS / min(seconds[1:]) / 1e12:.0f}"


ours = {
    "forward": lambda: forward((rows,), (weights,), groups, is_transposed=False, blocks=H200),
    "input gradient": lambda: forward(
        (cotangent,), (weights,), groups, is_transposed=True, blocks=H200
    ),
    "weight gradient": lambda: weight_gradient(rows, cotangent, groups, blocks=H200),
}
theirs = {
    "forward": [lambda w=w: torch._grouped_mm(x, w, ends) for w in (w, w_by_columns)],
    "input gradient": [
        lambda w=w: torch._grouped_mm(y, w.transpose(1, 2), ends) for w in (w, w_by_columns)
    ],
    "weight gradient": [lambda: torch._grouped_mm(x.t(), y, ends)],
}
print(
    f"groups of {sizes.tolist()} rows\n| part | ours | torch._grouped_mm: weights by rows, by columns |\n|---|---|---|"
)
for part, run in ours.items():
    peers = ", ".join(tflops(each, lambda _: torch.cuda.synchronize()) for each in theirs[part])
    print(f"| {part} | {tflops(run, jax.block_until_ready)} | {peers} |")
