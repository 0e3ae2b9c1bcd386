"""The gradient of one step on two meshes: its bits from run to run, and how far the two are apart.

python experiments/bench/gradient_bits.py experiments/configs/runs/mixtral_4b.gin \\
    --set data.batch_size=8 --mesh mesh.data=2 --mesh mesh.expert=2

Parameters, batch and key are the same on both. One JSON line a mesh, with the largest relative
difference between runs of a parameter's gradient, then one with that between the meshes' first
runs; the norm of the difference over the norm. In float64, which a CPU has, the latter is 1e-12;
in bfloat16 about 1e-2.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from gin_run import devices, make_parser, start_run, synthetic_batch


def parse_arguments():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--mesh", action="append", nargs="+", required=True, help="its overrides")
    parser.add_argument("--runs", type=int, default=6)
    return parser.parse_args()


@jax.jit
def relative_difference(found, expected):
    """The norm of the difference over the norm, by leaf."""

    def of_leaf(found, expected):
        wide = jnp.promote_types(found.dtype, jnp.float32)
        found, expected = found.astype(wide), expected.astype(wide)
        return jnp.linalg.norm(jnp.ravel(found - expected)) / jnp.linalg.norm(jnp.ravel(expected))

    return jax.tree.map(of_leaf, found, expected)


def worst(differences):
    """The parameter that differs most, and how much; not a number counts as the most."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(differences))
    path, value = max(leaves, key=lambda leaf: np.nan_to_num(leaf[1], nan=np.inf))
    return {"parameter": jax.tree_util.keystr(path), "difference": float(value)}


def first_and_differences(run, num_runs):
    """(loss and gradient of the first run, the worst difference of each other from it).

    Two gradients are on the devices at a time, where they are compared.
    """
    setup = run.setup()
    state, batch = setup.init(seed=0), synthetic_batch(run, setup.mesh)
    function = jax.jit(setup.region.gradient(setup.loss_fn))
    compiled = function.lower(state.params, batch, state.key).compile()
    (loss, weight, _), first = compiled(state.params, batch, state.key)
    found = []
    for _ in range(num_runs - 1):
        _, gradient = compiled(state.params, batch, state.key)
        found.append(worst(relative_difference(gradient, first)))
    return float(loss / weight), jax.device_get(first), found


def beside(found, expected):
    """The worst difference of gradients of two meshes, from the host by way of one device."""
    put = functools.partial(jax.device_put, device=jax.devices()[0])
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    each = [relative_difference(put(a), put(b)).item() for a, b in pairs]
    return worst(jax.tree.unflatten(jax.tree.structure(found), each))


def main():
    """Compare the runs of each mesh, then the meshes."""
    options = parse_arguments()
    firsts = []
    for mesh in options.mesh:
        run = start_run(options.file, [*options.set, *mesh])
        loss, first, found = first_and_differences(run, options.runs)
        firsts.append(first)
        most = max(found, key=lambda each: np.nan_to_num(each["difference"], nan=np.inf))
        num_same = sum(each["difference"] == 0 for each in found)
        line = {"mesh": mesh, "loss": loss, "same_bits": f"{num_same} of {len(found)}"}
        print(json.dumps(devices() | line | most), flush=True)
    for mesh, other in zip(options.mesh[1:], firsts[1:], strict=True):
        print(json.dumps({"mesh": mesh} | beside(other, firsts[0])), flush=True)


if __name__ == "__main__":
    main()
