"""Milliseconds of the Triton kernels with a file's block sizes and with the package's, on one GPU.

Only operations whose block sizes differ, at larger shapes than those that `jaxscale tune` measures:
attention of B4 T4096 N32 K8, and 16 groups of experts.

python experiments/bench/triton_blocks.py blocks.json  # written by `jaxscale tune`
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxscale.kernels import tuning
from jaxscale.kernels.triton_call import Blocks, package_blocks

ROUNDS = 3


def larger(problem):
    """The arrays of a problem with twice the rows and heads, or twice the groups and rows."""
    arrays = problem.arguments
    if problem.operation.startswith("attention"):
        twice = {4: (2, 1, 2, 1), 3: (2, 2, 1), 2: (1, 1)}
        return tuple(jnp.tile(each, twice[each.ndim]) for each in arrays)
    if problem.operation == "grouped_matmul.forward":
        rows, weights, sizes = arrays
        return jnp.tile(rows, (2, 2)), jnp.tile(weights, (2, 2, 1)), jnp.tile(sizes, 2)
    if problem.operation == "grouped_matmul.weight_gradient":
        rows, cotangent, sizes = arrays
        return jnp.tile(rows, (2, 2)), jnp.tile(cotangent, (2, 1)), jnp.tile(sizes, 2)
    return arrays


def difference(found, expected):
    """Norm of the difference over that of the expected arrays, the largest."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    wide = [(a.astype("float32"), b.astype("float32")) for a, b in pairs]
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in wide)


def main(path):
    """One row for each operation; the fastest of rounds in turn."""
    print(f"{jax.devices()[0].device_kind}\n")
    given = json.loads(Path(path).read_text())["blocks"]
    print("| operation | package's | ms | file's | ms | file's of package's | difference |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for problem in tuning.problems():
        ours = package_blocks(problem.operation)
        theirs = Blocks(**given.get(problem.operation, dataclasses.asdict(ours)))
        if ours == theirs:
            continue
        arrays = larger(problem)
        problem = dataclasses.replace(problem, arguments=arrays, candidates=(theirs,))
        runs = {each: made.result() for each, made in tuning.compiled_with(problem).items()}
        ms = [[tuning.milliseconds(run, arrays) for run in runs.values()] for _ in range(ROUNDS)]
        mine, other = map(min, zip(*ms, strict=True))
        # Tiles of a vocabulary are relative to their own largest logit.
        is_alike = problem.operation != "linear_cross_entropy"
        error = difference(runs[theirs](*arrays), runs[ours](*arrays)) if is_alike else 0
        cells = [problem.operation, dataclasses.astuple(ours), f"{mine:.3f}"]
        cells += [
            dataclasses.astuple(theirs),
            f"{other:.3f}",
            f"{other / mine:.3f}",
            f"{error:.1e}",
        ]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
