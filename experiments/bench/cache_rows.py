"""Microseconds of one token's attention over a long cache, as XLA does its products.

With as many kv heads as query heads each head's product with its keys has one row, which XLA adds
up in a reduction instead of multiplying. Rows of zeros beside it make a matmul of it. The softmax
takes the token's row alone. On a Hopper GPU the kernel of a long cache comes last.

python experiments/bench/cache_rows.py 65600  # and shorter ones: multiples of 64
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from jaxscale.ops.attention import AttentionContext, cache_kernels

LAYERS, ROUNDS, ROWS = 8, 5, 8
HEADS, HEAD_DIM, LENGTH = 32, 96, 65600


def wide(equation, x, y):
    """An einsum with sums in float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def keys_alone(q, k, v, num_rows):
    """The sum of the logits' exponentials, for all heads [K, H]."""
    rows = jnp.pad(q[:, None], ((0, 0), (0, num_rows - 1), (0, 0)))
    logits = wide("krh,ksh->krs", rows, k)[:, 0]
    return (jax.nn.logsumexp(logits, -1, keepdims=True) * 1e-3).astype(q.dtype) + q


def values_alone(q, k, v, num_rows):
    """Values weighed alike but for what q says."""
    weights = jnp.broadcast_to(q[:, :1], (q.shape[0], v.shape[1]))
    weights = jax.lax.optimization_barrier(weights)
    return wide("ks,ksh->kh", weights, v).astype(q.dtype)


def whole(q, k, v, num_rows):
    """Attention."""
    rows = jnp.pad(q[:, None], ((0, 0), (0, num_rows - 1), (0, 0)))
    logits = wide("krh,ksh->krs", rows, k)[:, 0]
    weights = jax.nn.softmax(logits * q.shape[1] ** -0.5).astype(v.dtype)
    return wide("ks,ksh->kh", weights, v).astype(q.dtype)


def kernel(q, k, v, num_rows):
    """Attention by our kernel over pages, of a token that sees all but the last slots."""
    slots = jnp.arange(k.shape[1])[None]
    context = AttentionContext(slots[:, -33:-32], key_positions=slots)
    return cache_kernels.over_slots(q[None, None], k[None], v[None], context)[0, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def chain(f, num_rows, q, keys, values):
    """All layers, each of which waits for the one before."""
    for k, v in zip(keys, values, strict=True):
        q = f(q, k, v, num_rows)
    return q


def draw(length):
    """A token's queries, and the keys and values of the layers."""
    shape = HEADS, length, HEAD_DIM
    caches = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2 * LAYERS)]
    q = jax.random.normal(jax.random.key(99), (HEADS, HEAD_DIM), jnp.bfloat16)
    return q, caches[:LAYERS], caches[LAYERS:]


def microseconds(f, num_rows, arrays):
    """Of one layer, the mean of the rounds."""
    chain(f, num_rows, *arrays).block_until_ready()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        y = chain(f, num_rows, *arrays)
    y.block_until_ready()
    return (time.perf_counter() - began) / ROUNDS / LAYERS * 1e6


def main(length=LENGTH):
    """One row for each part and number of rows."""
    arrays = draw(length)
    print(f"{jax.devices()[0].device_kind}, {HEADS} heads of {HEAD_DIM}, {length} tokens\n")
    print("| part | rows | microseconds | TB/s of the cache |\n|---|---|---|---|")
    cases = ((keys_alone, 1), (keys_alone, ROWS), (values_alone, 1))
    cases += ((whole, 1), (whole, ROWS), (kernel, 1))
    for f, num in cases:
        took = microseconds(f, num, arrays)
        num_bytes = arrays[1][0].nbytes * (1 + (f in (whole, kernel)))
        print(f"| {f.__name__} | {num} | {took:.1f} | {num_bytes / took / 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
