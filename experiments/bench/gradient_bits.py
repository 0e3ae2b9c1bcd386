"""The gradient of one step on two meshes: its bits from run to run, and how far the two are apart.

python experiments/bench/gradient_bits.py experiments/configs/runs/mixtral_4b.gin \\
    --set data.batch_size=8 --mesh mesh.data=2 --mesh mesh.expert=2

Parameters, batch and key are the same on both. One JSON line a mesh: of how many runs after the
first the loss had other bits, and for each parameter that had, in any of them, the last layer that
did. Then one line with the same of the two meshes' first runs. A difference is its norm over the
gradient's; between meshes it is below 1e-5 in float32 on a CPU, and in bfloat16 as large as what
bfloat16 does to a gradient on one device: 1e-2, and in a mixture 0.1 and more, for tokens near a
tie of two experts take the other one.

The backward goes from the last layer to the first, so the last layer that differs is where a
difference began. `experiments/results/2026-11-29_two_h200_scaling.md` says which may differ.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from gin_run import devices, make_parser, start_run, synthetic_batch

from jaxscale.ops.precision import accumulator


def parse_arguments():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--mesh", action="append", nargs="+", required=True, help="its overrides")
    parser.add_argument("--runs", type=int, default=6)
    return parser.parse_args()


def name_of(path):
    """Of a parameter."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def relative_differences(found, expected):
    """The norm of the difference over the norm: one for each layer of what layers have.

    0 for the same bits, also of NaN.
    """

    def of_leaf(path, found, expected):
        axes = tuple(range(1 if name_of(path).startswith("layers/") else 0, found.ndim))
        bits = f"uint{8 * found.dtype.itemsize}"
        is_other = found.view(bits) != expected.view(bits)
        found, expected = accumulator(found), accumulator(expected)
        squares = (jnp.square(x).sum(axes) for x in (found - expected, expected))
        ratio = jnp.sqrt(jnp.divide(*squares))
        return jnp.where(is_other.any(axes), ratio, 0)

    return jax.tree_util.tree_map_with_path(of_leaf, found, expected)


def differences(found, expected):
    """`relative_differences` that are not 0, and inf for NaN, by (name, layer or 0)."""
    values = jax.device_get(relative_differences(found, expected))
    return {
        (name_of(path), layer): math.inf if math.isnan(value) else float(value)
        for path, leaf in jax.tree_util.tree_leaves_with_path(values)
        for layer, value in enumerate(np.ravel(leaf))
        if value != 0
    }


def told(differing):
    """The last layer that differs of each parameter, and the largest difference with its place."""
    largest = max(differing, key=differing.get, default=None)
    last_layer = dict(sorted(differing))
    return {"last_layer": last_layer, "largest": differing.get(largest, 0.0), "of": largest}


def runs_of(run, num_runs):
    """(loss, gradient) of each run of one compiled program."""
    setup = run.setup()
    state, batch = setup.init(seed=0), synthetic_batch(run, setup.mesh)
    function = jax.jit(setup.region.gradient(setup.loss_fn))
    compiled = function.lower(state.params, batch, state.key).compile()
    for _ in range(num_runs):
        (loss, weight, _), gradient = compiled(state.params, batch, state.key)
        yield float(loss / weight), gradient


def compared(run, num_runs):
    """(what is to be told of the runs, the first gradient, on the host)."""
    runs = runs_of(run, num_runs)
    first_loss, first = next(runs)
    num_losses, largest = 0, {}
    for loss, gradient in runs:
        num_losses += loss != first_loss
        for place, value in differences(gradient, first).items():
            largest[place] = max(value, largest.get(place, 0))
    line = {"loss": first_loss, "other_losses": num_losses}
    return line | told(largest), jax.device_get(first)


def main():
    """Compare the runs of each mesh, then the meshes."""
    options = parse_arguments()
    firsts = []
    for mesh in options.mesh:
        run = start_run(options.file, [*options.set, *mesh])
        line, first = compared(run, options.runs)
        firsts.append(first)
        print(json.dumps(devices() | {"mesh": mesh} | line), flush=True)
    for mesh, other in zip(options.mesh[1:], firsts[1:], strict=True):
        print(json.dumps({"mesh": mesh} | told(differences(other, firsts[0]))), flush=True)


if __name__ == "__main__":
    main()
