"""Device time of one mixture-of-experts feed-forward: grouped matmuls, and all the rest by kernel.

python experiments/bench/moe_layer.py 16384 4096 6400 16 sparsemixer_v2
    # tokens, D, F, experts, router; two experts a token, forward and backward
"""

import collections
import sys
import tempfile

import jax
import jax.numpy as jnp
from profile_table import device_events, kernel_times

from jaxscale.models.config import ExpertsConfig, SparseMixerRouter, TopKRouter
from jaxscale.models.moe import experts, router_sums
from jaxscale.ops.backends import Operations
from jaxscale.ops.draws import Draws

REPEATS, NUM_ACTIVE = 5, 2
ROUTERS = {"gshard": TopKRouter(), "sparsemixer_v2": SparseMixerRouter()}
GROUPED = "mosaic_gpu"  # what the names of the grouped matmuls' kernels contain


def draw(i, *shape, dtype="bfloat16"):
    """Normal, of the usual size."""
    values = jax.random.normal(jax.random.key(i), shape) * shape[-1] ** -0.5
    return values.astype(dtype)


def draw_arguments(num_tokens, D, F, E):
    """Parameters, the layer's input, the gradient of its output, and the router's random bits."""
    h, dy = (draw(i, 1, num_tokens, D) * D**0.5 for i in (0, 1))
    weights = {
        "gate": draw(2, E, D, F),
        "up": draw(3, E, D, F),
        "down": draw(4, E, F, D),
    }
    params = {"router": draw(5, D, E, dtype="float32") * 8, "experts": weights}
    bits = jax.random.bits(jax.random.key(6), (1, num_tokens, 2))
    return params, h, dy, Draws(bits)


def make_layer(config):
    """The compiled gradients of the layer, those of the balance loss included."""

    @jax.jit
    def layer(params, h, dy, draws):
        weights = jnp.ones(h.shape[:2])

        def loss(params, h):
            y, choices = experts(params, h, config, Operations(), draws)
            sums = router_sums(choices, weights, config, Operations())
            return jnp.vdot(y, dy, preferred_element_type=jnp.float32) + sums.balance

        return jax.grad(loss, (0, 1))(params, h)

    return layer


def profile(layer, arguments):
    """Milliseconds and calls of each kernel in one run of the layer."""
    jax.block_until_ready(layer(*arguments))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready([layer(*arguments) for _ in range(REPEATS)])
        nanoseconds, calls = kernel_times(device_events(directory))
    milliseconds = {name: each / 1e6 / REPEATS for name, each in nanoseconds.items()}
    return collections.Counter(milliseconds), calls


def main(num_tokens, D, F, E, router):
    """The total, the share of the grouped matmuls, and the largest other kernels."""
    config = ExpertsConfig(num_experts=E, dim=F, num_active=NUM_ACTIVE, router=ROUTERS[router])
    arguments = draw_arguments(num_tokens, D, F, E)
    milliseconds, calls = profile(make_layer(config), arguments)
    total = sum(milliseconds.values())
    grouped = sum(ms for name, ms in milliseconds.items() if GROUPED in name)
    # Three matrices, forward and two gradients, two FLOPs a multiplication.
    flops = 3 * 3 * 2 * NUM_ACTIVE * num_tokens * D * F
    rate = flops / grouped / 1e9
    matmuls = f"grouped matmuls {grouped:.2f} ({rate:.0f} TFLOP/s)"
    print(f"{total:.2f} ms, of which {matmuls}; the rest {1 - grouped / total:.1%}:")
    for name, ms in milliseconds.most_common(25):
        if GROUPED not in name:
            print(f"{ms:8.3f} ms {calls[name] / REPEATS:5.1f} x {name}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), sys.argv[5])
