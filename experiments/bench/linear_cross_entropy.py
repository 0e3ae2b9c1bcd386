"""Milliseconds and memory of the head's matmul with cross-entropy, forward and backward.

python experiments/bench/linear_cross_entropy.py 16384 2048 32064  # tokens, D, V

The floor beside it is the time of its three matmuls alone.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from jaxscale.kernels.linear_cross_entropy.api import label_and_normaliser
from jaxscale.ops.loss import from_logits, project, sum_over_chunks

REPEATS, ROUNDS = 10, 5
HEADER = """\
| form | chunks | ms | of three matmuls | GiB | gradients beside the first's |
|---|---|---|---|---|---|"""


def with_logits(h, head, labels, weights):
    """The summed loss, by float32 logits."""
    label, normaliser = from_logits(project(h, head), labels)
    losses = (normaliser - label) * weights
    return (losses.sum(),)


def without_logits(h, head, labels, weights):
    """The summed loss, by our kernel."""
    label, normaliser = label_and_normaliser(
        h[0],
        head,
        labels[0],
        implementation="mosaic",
    )
    losses = (normaliser - label) * weights[0]
    return (losses.sum(),)


def measure(f, *arguments):
    """(result, milliseconds of the fastest round, GiB of temporaries)."""
    step = jax.jit(f).lower(*arguments).compile()
    result = jax.block_until_ready(step(*arguments))
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            last = step(*arguments)
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - began) / REPEATS)
    temporaries = step.memory_analysis().temp_size_in_bytes
    return result, min(seconds) * 1e3, temporaries / 2**30


def measure_matmuls(h, head, dlogits):
    """Milliseconds of the three matmuls: logits, gradient of h, gradient of the head."""
    matmuls = (
        lambda h, head, dlogits: h[0] @ head.T,
        lambda h, head, dlogits: dlogits @ head,
        lambda h, head, dlogits: dlogits.T @ h[0],
    )
    return [measure(matmul, h, head, dlogits)[1] for matmul in matmuls]


def relative_error(found, expected):
    """Norm of the difference over that of the expected array."""
    difference = (found - expected).astype("float32")
    size = jnp.linalg.norm(expected.astype("float32"))
    return jnp.linalg.norm(difference) / size


def main(num_tokens, dim, vocab_size):
    """One row per form and number of chunks."""
    keys = jax.random.split(jax.random.key(0), 4)
    h = jax.random.normal(keys[0], (1, num_tokens, dim), jnp.bfloat16)
    head = 0.02 * jax.random.normal(keys[1], (vocab_size, dim))
    head = head.astype(jnp.bfloat16)
    labels = jax.random.randint(keys[2], (1, num_tokens), 0, vocab_size)
    weights = jnp.ones((1, num_tokens), jnp.float32)
    dlogits = jax.random.normal(keys[3], (num_tokens, vocab_size), jnp.bfloat16)

    three = measure_matmuls(h, head, dlogits)
    each = ", ".join(f"{ms:.2f}" for ms in three)
    print(f"matmuls {each} ms, {sum(three):.2f} in all\n\n{HEADER}")

    def loss(h, head, form, num_chunks):
        return sum_over_chunks(form, num_chunks, h, head, labels, weights)[0]

    first = None
    for form in (with_logits, without_logits):
        for num_chunks in (1, 4, 8):
            of_form = functools.partial(loss, form=form, num_chunks=num_chunks)
            with_gradients = jax.value_and_grad(of_form, (0, 1))
            (_, gradients), ms, gib = measure(with_gradients, h, head)
            first = first or gradients
            pairs = zip(gradients, first, strict=True)
            errors = ", ".join(f"{relative_error(*pair):.1e}" for pair in pairs)
            cells = [
                form.__name__,
                f"{num_chunks}",
                f"{ms:.2f}",
                f"{ms / sum(three):.3f}",
                f"{gib:.2f}",
                errors,
            ]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
