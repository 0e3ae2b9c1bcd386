"""Memory of the Evoformer's attention, forward and backward, beside the form that holds all logits.

Temporaries as the compiler lays them out for a described H200; nothing is run.

JAX_PLATFORMS=cpu python experiments/bench/evoformer_memory.py
"""

import functools

import jax
import jax.numpy as jnp

from jaxscale.launch.ahead_of_time import as_on, described_devices, memory_of
from jaxscale.ops.attention.evoformer import KEY_CHUNK, evoformer_attention

# Rows, queries and keys, heads, width: alignments, a column, pairs.
SHAPES = (
    (512, 256, 8, 8),
    (512, 256, 8, 32),
    (512, 384, 8, 32),
    (5120, 384, 8, 8),
    (256, 5120, 8, 8),
    (384, 384, 4, 32),
    (1024, 1024, 4, 32),
)
CHUNKS = (16, KEY_CHUNK, 64)


def step(operands, do, **options):
    """The output and the gradients of all operands."""
    o, pullback = jax.vjp(functools.partial(evoformer_attention, **options), *operands)
    return o, pullback(do)


def temporaries_gib(device, shape, dtype, **options):
    """What is neither an argument nor a result."""
    rows, length, heads, width = shape
    own = jax.sharding.SingleDeviceSharding(device)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=own)
    q = array((1, rows, length, heads, width), dtype)
    mask_bias = array((1, rows, 1, 1, length), jnp.float32)
    pair_bias = array((1, 1, heads, length, length), jnp.float32)
    lowered = jax.jit(functools.partial(step, **options)).lower((q, q, q, mask_bias, pair_bias), q)
    return memory_of(lowered.compile()).temporaries / 2**30


def main():
    """Print the table."""
    (device,) = described_devices("h200", num_hosts=1, gpus_per_host=1)
    names = "".join(f" {chunk} keys |" for chunk in CHUNKS)
    columns = f"| rows, length, heads, width | type | all logits |{names} Triton |"
    print(f"{columns}\n|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            measure = functools.partial(temporaries_gib, device, shape, dtype)
            with as_on([device]):
                plain = measure(implementation="reference")
                found = [measure(implementation="chunked", key_chunk=c) for c in CHUNKS]
                if dtype == "bfloat16":
                    found.append(measure(implementation="triton"))
            cells = " | ".join(f"{gib:.3g} ({plain / gib:.1f} times less)" for gib in found)
            # The kernel takes no float32.
            cells += " | not taken" if dtype == "float32" else ""
            place = ", ".join(f"{size:,}" for size in shape)
            print(f"| {place} | {dtype} | {plain:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
