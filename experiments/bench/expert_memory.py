"""Memory of an MoE layer's experts, forward and backward, on 8 described H200s.

One row per axis of the experts and number of them (16, 64, 128); no GPU is needed.

JAX_PLATFORMS=cpu python experiments/bench/expert_memory.py
"""

import jax
from jax.sharding import PartitionSpec

from jaxscale.launch.ahead_of_time import as_on, described_devices, memory_of
from jaxscale.parallel import expert, tensor
from jaxscale.parallel.mesh import EXPERT, TENSOR, MeshConfig, make_mesh

GPUS = 8
TOKENS, ACTIVE = 4096, 8  # on each GPU; choices a token
WIDE, NARROW = 2048, 768  # the experts' D and F


def gradients_of(run):
    """The gradients of tokens, gates and weights, inside the manual region."""

    def gradients(x, gates, weights, index):
        def layer(x, gates, weights):
            x, gates, chosen = (tensor.gather_tokens(each) for each in (x, gates, index))
            return tensor.reduce_scatter_tokens(run(x, chosen, gates, weights, "swiglu"))

        y, pullback = jax.vjp(layer, x, gates, weights)
        return pullback(y)

    return gradients


def abstract_arguments(num_experts):
    """Shapes of tokens, gates, weights and chosen experts, over all GPUs."""
    shapes = {
        "up": (WIDE, NARROW),
        "gate": (WIDE, NARROW),
        "down": (NARROW, WIDE),
    }
    weights = {
        name: jax.ShapeDtypeStruct((num_experts, *shape), "bfloat16")
        for name, shape in shapes.items()
    }
    num_tokens = GPUS * TOKENS
    x = jax.ShapeDtypeStruct((1, num_tokens, WIDE), "bfloat16")
    gates = jax.ShapeDtypeStruct((1, num_tokens, ACTIVE), "float32")
    index = jax.ShapeDtypeStruct((1, num_tokens, ACTIVE), "int32")
    return x, gates, weights, index


def peak_gib(devices, axis, num_experts):
    """On one GPU: tokens, bfloat16 experts, the gradients of both and everything in between."""
    config = MeshConfig(**{axis: GPUS}, expert_axis=axis)
    rows = PartitionSpec(None, (EXPERT, TENSOR))
    by_expert = PartitionSpec((EXPERT, TENSOR))
    run_all = jax.shard_map(
        gradients_of(expert.make_experts(config)),
        mesh=make_mesh(config, devices),
        in_specs=(rows, rows, by_expert, rows),
        out_specs=(rows, rows, by_expert),
        check_vma=False,
    )
    with as_on(devices):
        lowered = jax.jit(run_all).lower(*abstract_arguments(num_experts))
        return memory_of(lowered.compile()).peak / 2**30


def main():
    """Print the table."""
    devices = described_devices("h200", num_hosts=1, gpus_per_host=GPUS)
    print("| experts | axis | GiB |\n|---|---|---|")
    for num_experts in (16, 64, 128):
        for axis in (EXPERT, TENSOR):
            gib = peak_gib(devices, axis, num_experts)
            print(f"| {num_experts} | {axis} | {gib:.2f} |", flush=True)


if __name__ == "__main__":
    main()
