"""The peer of decode.py: greedy decoding of a Llama shape in plain JAX, nothing of jaxscale in it.

Layers are unrolled. One matmul makes q, k and v, one makes gate and up. Each layer has a contiguous
cache, which is donated and updated in place; attention is two einsums over the whole cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes by the dim letters of jaxscale/types.py; L layers."""

    V: int
    L: int
    D: int
    N: int
    K: int
    H: int
    F: int


def draw_weights(shape):
    """Random matrices of the usual size in bfloat16; the norms' scales are 1."""
    D, N, K, H, F = shape.D, shape.N, shape.K, shape.H, shape.F

    def draw(rows, columns):
        key = jax.random.key(0)
        values = jax.random.normal(key, (rows, columns), jnp.bfloat16)
        return values * rows**-0.5

    def draw_layer():
        return {
            "qkv": draw(D, (N + 2 * K) * H),
            "out": draw(N * H, D),
            "gate_up": draw(D, 2 * F),
            "down": draw(F, D),
            "attention_norm": jnp.ones(D, jnp.bfloat16),
            "ffn_norm": jnp.ones(D, jnp.bfloat16),
        }

    return {
        "embedding": draw(shape.V, D),
        "layers": [draw_layer() for _ in range(shape.L)],
        "norm": jnp.ones(D, jnp.bfloat16),
        "head": draw(D, shape.V),
    }


def empty_caches(shape, batch_size, capacity):
    """Keys and values [B, K, S, H] of each layer."""
    sizes = (batch_size, shape.K, capacity, shape.H)
    caches = []
    for _ in range(shape.L):
        keys, values = jnp.zeros(sizes, jnp.bfloat16), jnp.zeros(sizes, jnp.bfloat16)
        caches.append({"keys": keys, "values": values})
    return caches


@functools.partial(jax.jit, static_argnames="shape", donate_argnames="caches")
def step(weights, caches, token, position, *, shape):
    """Run one token [B] of each row at a position: (caches, next token [B], next position)."""
    x = weights["embedding"][token]
    new_caches = []
    for layer, cache in zip(weights["layers"], caches, strict=True):
        h = rms_norm(x, layer["attention_norm"])
        o, cache = attention(layer, h, cache, position, shape)
        new_caches.append(cache)
        x += o @ layer["out"]
        h = rms_norm(x, layer["ffn_norm"])
        gate, up = jnp.split(h @ layer["gate_up"], 2, axis=-1)
        x += (jax.nn.silu(gate) * up) @ layer["down"]
    logits = rms_norm(x, weights["norm"]) @ weights["head"]
    return new_caches, jnp.argmax(logits, axis=-1), position + 1


def attention(layer, h, cache, position, shape):
    """(output [B, N H], cache with the new token); scores and sums are in float32."""
    N, K, H = shape.N, shape.K, shape.H
    qkv = (h @ layer["qkv"]).reshape(-1, N + 2 * K, H)
    q, k, v = jnp.split(qkv, [N, N + K], axis=1)
    q, k = rotate(q, position), rotate(k, position)
    update = jax.lax.dynamic_update_index_in_dim
    keys = update(cache["keys"], k, position, axis=2)
    values = update(cache["values"], v, position, axis=2)

    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q = q.reshape(-1, K, N // K, H)
    scores = einsum("bkgh,bksh->bkgs", q, keys) * H**-0.5
    capacity = keys.shape[2]
    is_seen = jnp.arange(capacity) <= position
    scores = jnp.where(is_seen, scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores).astype(h.dtype)
    o = einsum("bkgs,bksh->bkgh", probabilities, values)
    o = o.reshape(-1, N * H).astype(h.dtype)
    return o, {"keys": keys, "values": values}


def rms_norm(x, scale):
    """Root-mean-square norm over the last dim, in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(mean_square + 1e-5)
    normed = wide * inverse
    return normed.astype(x.dtype) * scale


def rotate(x, position):
    """Rotary embedding of [B, heads, H] at one position."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half) / half)
    angles = position * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    halves = [
        first * cos - second * sin,
        second * cos + first * sin,
    ]
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)
