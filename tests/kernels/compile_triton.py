"""Compiles every Triton kernel for one GPU that is not here; prints name and most shared memory.

python tests/kernels/compile_triton.py 8.0
"""

import sys

import jax
import jax.numpy as jnp
import jax_triton.triton_lib as triton_lib
from jax.sharding import AxisType, PartitionSpec

from jaxscale.kernels import device
from jaxscale.kernels.attention import triton_backward, triton_forward
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.kernels.evoformer_attention.api import evoformer_attention
from jaxscale.kernels.grouped_matmul import triton as grouped_matmul
from jaxscale.kernels.linear_cross_entropy import triton as linear_cross_entropy
from jaxscale.kernels.paged_attention import triton as paged_attention
from jaxscale.kernels.rms_norm import triton as rms_norm


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def integers(*shape):
    return array(*shape, dtype="int32")


def programs():
    """(name, function, arguments) at shapes that models train and serve with."""
    rows, weights, products = array(4096, 2048), array(16, 2048, 1408), array(4096, 1408)

    def multiply(left, right, sizes, is_transposed):
        return grouped_matmul.forward((left,), (right,), sizes, is_transposed=is_transposed)

    sizes = integers(16)
    yield "product", lambda *a: multiply(*a, False), (rows, weights, sizes)
    yield "input gradient", lambda *a: multiply(*a, True), (products, weights, sizes)
    alike = array(2, 4096, 1024), array(2, 16, 1024, 512), integers(2, 16)
    yield "product under vmap", jax.vmap(lambda *a: multiply(*a, False)), alike
    yield "weight gradient", grouped_matmul.weight_gradient, (rows, products, sizes)
    yield "cross-entropy", linear_cross_entropy.exponentials, (rows, array(32064, 2048))
    scale = array(2048, dtype="float32")
    yield "norm", lambda *a: rms_norm.backward(*a, epsilon=1e-5), (rows, scale, rows, rows)
    for head_dim in (64, 128, 256):
        yield from attention_programs(head_dim, None)
        table = integers(64, 20), integers(64), integers(64)
        pages = array(999, 128, 8, head_dim)
        for layout in (None, BlockLayout()):
            settings = dict(scale=0.1, softcap=None, layout=layout)
            yield (
                f"pages {head_dim}{' layout' if layout else ''}",
                lambda *a, settings=settings: paged_attention.paged_attention(*a, **settings),
                (array(64, 32, head_dim), pages, pages, *table),
            )
        yield from attention_programs(head_dim, BlockLayout())
    yield from evoformer_programs()
    settings = dict(scale=0.1, softcap=None)
    yield (
        "pages, mask",
        lambda *a: paged_attention.paged_attention(*a, **settings),
        (array(64, 32, 128), array(999, 128, 8, 128), array(999, 128, 8, 128))
        + (integers(64, 20), integers(64), integers(64), array(8, 2560, dtype="bool")),
    )


def evoformer_programs():
    """At lengths that are whole tiles and at others, for heads of each kind."""

    def attend(*operands):
        return evoformer_attention(*operands, implementation="triton")

    def gradients(*operands):
        return jax.vjp(attend, *operands)[1](operands[0])

    def operands(width, length):
        q = array(1, 128, length, 4, width)
        pair_bias = array(1, 1, 4, length, length, dtype="float32")
        return q, q, q, array(1, 128, 1, 1, length), pair_bias

    for width, length in ((8, 256), (32, 255), (64, 256), (128, 255)):
        yield f"evoformer {width}", attend, operands(width, length)
        yield f"evoformer gradients {width}", gradients, operands(width, length)
    # Here JAX checks over which axes what the kernels gave varies.
    rows = PartitionSpec(None, "row")
    specs = rows, rows, rows, rows, PartitionSpec()
    mesh = jax.make_mesh((1,), ("row",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs)
    yield "evoformer gradients in shards", sharded, operands(16, 100)


def attention_programs(head_dim, layout):
    settings = dict(scale=0.1, softcap=30.0, layout=layout)
    q, kv, bounds = array(2, 2048, 32, head_dim), array(2, 2048, 8, head_dim), integers(1, 2048)
    lse = array(2, 32, 2048, dtype="float32")
    name = f"{head_dim}{' layout' if layout else ''}"
    yield (
        f"attention {name}",
        lambda *a: triton_forward.forward(*a, **settings),
        (q, kv, kv, bounds, bounds),
    )
    yield (
        f"attention gradient {name}",
        lambda *a: triton_backward.backward(*a, **settings, dq_dtype=jnp.bfloat16),
        (q, kv, kv, q, lse, lse, bounds, bounds),
    )


def main(capability):
    """One line a kernel."""
    device.compute_capability = lambda: capability
    library, shared = triton_lib.triton_kernel_call_lib, []
    make_kernel = library.TritonKernel

    def noted(name, warps, blocks, shared_bytes, *rest):
        shared.append(shared_bytes)
        return make_kernel(name, warps, blocks, shared_bytes, *rest)

    library.TritonKernel = noted
    for name, f, arguments in programs():
        jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",))
        print(f"{name}: {max(shared)}", flush=True)
        shared.clear()


if __name__ == "__main__":
    main(sys.argv[1])
