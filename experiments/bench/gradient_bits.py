"""The gradient of one step on two meshes: its bits from run to run, and how far the two are apart.

python experiments/bench/gradient_bits.py experiments/configs/runs/mixtral_4b.gin \\
    --set data.batch_size=8 --mesh mesh.data=2 --mesh mesh.expert=2

Parameters, batch and key are the same on both. One JSON line a mesh, with the largest relative
difference between runs of a parameter's gradient, then one with that between the meshes' first
runs; the norm of the difference over the norm. In float64, which a CPU has, the latter is 1e-12;
in bfloat16 about 1e-2.
"""

import json

import jax
import numpy as np
from gin_run import make_parser, start_run, synthetic_batch


def parse_arguments():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--mesh", action="append", nargs="+", required=True, help="its overrides")
    parser.add_argument("--runs", type=int, default=6)
    return parser.parse_args()


def relative_difference(found, expected):
    """The norm of the difference over the norm, by leaf."""

    def of_leaf(found, expected):
        found, expected = np.float32(found), np.float32(expected)
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    return jax.tree.map(of_leaf, found, expected)


def worst(differences):
    """The parameter that differs most, and how much; not a number counts as the most."""
    leaves = jax.tree_util.tree_leaves_with_path(differences)
    path, value = max(leaves, key=lambda leaf: np.nan_to_num(leaf[1], nan=np.inf))
    return {"parameter": jax.tree_util.keystr(path), "difference": value}


def gradients(run, num_runs):
    """(loss, gradient on the host) of each run of one compiled program."""
    setup = run.setup()
    state, batch = setup.init(seed=0), synthetic_batch(run, setup.mesh)
    function = jax.jit(setup.region.gradient(setup.loss_fn))
    compiled = function.lower(state.params, batch, state.key).compile()
    for _ in range(num_runs):
        (loss, weight, _), gradient = compiled(state.params, batch, state.key)
        yield float(loss / weight), jax.device_get(gradient)


def main():
    """Compare the runs of each mesh, then the meshes."""
    options = parse_arguments()
    firsts = []
    for mesh in options.mesh:
        run = start_run(options.file, [*options.set, *mesh])
        (loss, first), *others = gradients(run, options.runs)
        firsts.append(first)
        found = [worst(relative_difference(other, first)) for _, other in others]
        most = max(found, key=lambda each: np.nan_to_num(each["difference"], nan=np.inf))
        num_same = sum(each["difference"] == 0 for each in found)
        line = {"mesh": mesh, "loss": loss, "same_bits": f"{num_same} of {len(found)}"}
        print(json.dumps(line | most), flush=True)
    for mesh, other in zip(options.mesh[1:], firsts[1:], strict=True):
        print(json.dumps({"mesh": mesh} | worst(relative_difference(other, firsts[0]))), flush=True)


if __name__ == "__main__":
    main()
