"""Device time of one mixture-of-experts feed-forward, forward and backward: grouped matmuls and all the rest.

python experiments/bench/moe_layer.py 16384 4096 6400 16 sparsemixer_v2  # tokens, D, F, experts,
router; two a token
"""

import collections
import sys
import tempfile

import jax
import jax.numpy as jnp
from profile_table import device_events, kernel_times

from jaxscale.models.config import ModelConfig
from jaxscale.models.moe import feed_forward
from jaxscale.ops.draws import Draws
from jaxscale.ops.moe import experts
from jaxscale.ops.operations import Operations

REPEATS, GROUPED = 5, "mosaic_gpu"
T, D, F, E = map(int, sys.argv[1:5])
model = ModelConfig(
    vocab_size=64,
    num_layers=1,
    model_dim=D,
    num_heads=1,
    num_kv_heads=1,
    head_dim=128,
    ffn_dim=F,
    max_length=T,
    moe_pattern=(True,),
    num_experts=E,
    num_active_experts=2,
    expert_dim=F,
    balance_loss=0.01,
    router=sys.argv[5],
)


def draw(i, *shape, dtype="bfloat16"):
    """Normal, of the usual size."""
    return (jax.random.normal(jax.random.key(i), shape) * shape[-1] ** -0.5).astype(dtype)


h, dy = (draw(i, 1, T, D) * D**0.5 for i in (0, 1))
weights = {"gate": draw(2, E, D, F), "up": draw(3, E, D, F), "down": draw(4, E, F, D)}
params = {"router": draw(5, D, E, dtype="float32") * 8, "experts": weights}


draws = Draws(jax.random.bits(jax.random.key(6), (1, T, 2)))


@jax.jit
def layer(params, h, dy, draws):
    """The layer's gradients; the balance loss among them."""

    def loss(params, h):
        y, sums = feed_forward(
            params, h, jnp.ones(h.shape[:2]), model, Operations(experts=experts), draws
        )
        return jnp.vdot(y, dy, preferred_element_type=jnp.float32) + sums.balance

    return jax.grad(loss, (0, 1))(params, h)


jax.block_until_ready(layer(params, h, dy, draws))
with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
        jax.block_until_ready([layer(params, h, dy, draws) for _ in range(REPEATS)])
    times, counts = kernel_times(device_events(directory))
milliseconds = collections.Counter({name: t / 1e6 / REPEATS for name, t in times.items()})
total = sum(milliseconds.values())
grouped = sum(ms for name, ms in milliseconds.items() if GROUPED in name)
rate = 18 * 2 * T * D * F / grouped / 1e9
print(
    f"{total:.2f} ms, of which grouped matmuls {grouped:.2f} ({rate:.0f} TFLOP/s); the rest {1 - grouped / total:.1%}:"
)
for name, ms in milliseconds.most_common(25):
    if GROUPED not in name:
        print(f"{ms:8.3f} ms {counts[name] / REPEATS:5.1f} x {name}")
