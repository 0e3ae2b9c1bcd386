"""Milliseconds and peak memory of the head's matmul with cross-entropy, forward and backward, beside its matmuls alone.

python experiments/bench/linear_cross_entropy.py 16384 2048 32064  # tokens, D, V
"""

import sys
import time

import jax
import jax.numpy as jnp

from jaxscale.kernels.linear_cross_entropy.api import label_and_normaliser
from jaxscale.ops.loss import from_logits, project, sum_over_chunks

REPEATS, ROUNDS = 10, 5
T, D, V = map(int, sys.argv[1:])
keys = jax.random.split(jax.random.key(0), 4)
h = jax.random.normal(keys[0], (1, T, D), jnp.bfloat16)
head = (jax.random.normal(keys[1], (V, D)) * 0.02).astype(jnp.bfloat16)
labels, weights = jax.random.randint(keys[2], (1, T), 0, V), jnp.ones((1, T), jnp.float32)
dlogits = jax.random.normal(keys[3], (T, V), jnp.bfloat16)


def measure(f, *arguments):
    """(result, milliseconds of the fastest round, GiB of temporaries)."""
    step = jax.jit(f).lower(*arguments).compile()
    result, seconds = jax.block_until_ready(step(*arguments)), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            last = step(*arguments)
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - began) / REPEATS)
    return result, min(seconds) * 1e3, step.memory_analysis().temp_size_in_bytes / 2**30


def with_logits(h, head, labels, weights):
    """The summed loss, by float32 logits."""
    label, normaliser = from_logits(project(h, head), labels)
    return (((normaliser - label) * weights).sum(),)


def without_logits(h, head, labels, weights):
    """The summed loss, by our kernel."""
    label, normaliser = label_and_normaliser(h[0], head, labels[0], implementation="mosaic")
    return (((normaliser - label) * weights[0]).sum(),)


matmuls = [lambda a, b, c: a[0] @ b.T, lambda a, b, c: c @ b, lambda a, b, c: c.T @ a[0]]
three = [measure(each, h, head, dlogits)[1] for each in matmuls]
print(f"matmuls {', '.join(f'{ms:.2f}' for ms in three)} ms, {sum(three):.2f} in all\n")
print(
    "| form | chunks | ms | of three matmuls | GiB | gradients beside the first's |\n|---|---|---|---|---|---|"
)
first = None
for form in (with_logits, without_logits):
    for chunks in (1, 4, 8):

        def loss(h, w, f=form, n=chunks):
            return sum_over_chunks(f, n, h, w, labels, weights)[0]

        (_, gradients), ms, gib = measure(jax.value_and_grad(loss, (0, 1)), h, head)
        first = first or gradients
        errors = [
            jnp.linalg.norm((a - b).astype("float32"))
            for a, b in zip(gradients, first, strict=True)
        ]
        errors = [
            f"{e / jnp.linalg.norm(b.astype('float32')):.1e}"
            for e, b in zip(errors, first, strict=True)
        ]
        print(
            f"| {form.__name__} | {chunks} | {ms:.2f} | {ms / sum(three):.3f} | {gib:.2f} | {', '.join(errors)} |"
        )
