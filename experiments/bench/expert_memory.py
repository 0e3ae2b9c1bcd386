"""Memory of an MoE layer's experts, forward and backward, on 8 described H200s: each exchange, 16, 64 and 128 experts.

JAX_PLATFORMS=cpu python experiments/bench/expert_memory.py
"""

import jax
from jax.sharding import PartitionSpec

from jaxscale.launch.ahead_of_time import as_on_gpus, described_devices, memory_of
from jaxscale.parallel import expert, tensor
from jaxscale.parallel.mesh import EXPERT, TENSOR, MeshConfig, make_mesh

GPUS, KINDS = 8, {"dense": EXPERT, "ragged": EXPERT, "tensor": TENSOR}
TOKENS, ACTIVE, WIDE, NARROW = (
    4096,
    8,
    2048,
    768,
)  # on each GPU; choices a token; the experts' D and F
devices = described_devices("h200", num_hosts=1, gpus_per_host=GPUS)


def peak(kind: str, num_experts: int) -> float:
    """GiB on one GPU: tokens, bfloat16 experts, the gradients of both and everything in between."""
    axis = KINDS[kind]
    config = MeshConfig(
        **{axis: GPUS}, expert_axis=axis, expert_exchange=kind if kind != TENSOR else "dense"
    )
    run, mesh = expert.make_experts(config), make_mesh(config, devices)

    def gradients(x, gates, weights, index):
        def layer(x, gates, weights):
            x, whole, chosen = map(tensor.gather_tokens, (x, gates, index))
            return tensor.reduce_scatter_tokens(run(x, chosen, whole, weights, "swiglu"))

        y, pullback = jax.vjp(layer, x, gates, weights)
        return pullback(y)

    rows = PartitionSpec(None, (EXPERT, TENSOR))
    specs = (rows, rows, PartitionSpec((EXPERT, TENSOR)), rows)
    run_all = jax.jit(
        jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs[:3], check_vma=False)
    )
    shapes = {"up": (WIDE, NARROW), "gate": (WIDE, NARROW), "down": (NARROW, WIDE)}
    weights = {
        name: jax.ShapeDtypeStruct((num_experts, *shape), "bfloat16")
        for name, shape in shapes.items()
    }
    sizes = {"bfloat16": WIDE, "float32": ACTIVE, "int32": ACTIVE}
    x, gates, index = (
        jax.ShapeDtypeStruct((1, GPUS * TOKENS, size), dtype) for dtype, size in sizes.items()
    )
    with as_on_gpus(devices):
        return memory_of(run_all.lower(x, gates, weights, index).compile()).peak / 2**30


print("| experts | exchange | GiB |\n|---|---|---|")
for num_experts in (16, 64, 128):
    for kind in KINDS:
        print(f"| {num_experts} | {kind} | {peak(kind, num_experts):.2f} |", flush=True)
