"""The exchange of tokens over `expert` against all experts on one device, also where the routing is extreme."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.ops import moe
from jaxscale.parallel.expert import experts
from jaxscale.parallel.mesh import EXPERT, MeshConfig, make_mesh

B, T, D, F, E = 4, 6, 5, 7, 8
RNG = np.random.default_rng(0)


def permuted(choices, num_active=2):
    return np.stack([RNG.permutation(choices)[:num_active] for _ in range(B * T)]).reshape(B, T, num_active)


ROUTINGS = {
    "random": permuted(E),
    "three_of_two_local": permuted(E, 3),
    "all_tokens_to_one_expert": np.full((B, T, 1), 5),
    "all_tokens_to_one_device": np.broadcast_to([6, 7], (B, T, 2)),
    "a_device_without_tokens": permuted([0, 1, 4, 5, 6, 7]),
    "each_device_to_the_next": np.repeat(np.arange(2, 10) % E, 6).reshape(B, T, 2),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_and_gradients_equal_one_device(routing):
    """Every token is counted: outputs, and gradients of tokens, gates and each expert's matrices."""
    index = jnp.asarray(ROUTINGS[routing])
    rng = np.random.default_rng(1)
    mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])
    with jax.enable_x64(True):
        weights = {
            name: jnp.asarray(rng.normal(size=(E, *shape)))
            for name, shape in {"up": (D, F), "gate": (D, F), "down": (F, D)}.items()
        }
        x, cotangent = (jnp.asarray(rng.normal(size=(B, T, D))) for _ in range(2))
        gates = jnp.asarray(rng.uniform(size=index.shape))

        def both(function, x, index, gates, weights, cotangent):
            y, pullback = jax.vjp(lambda x, g, w: function(x, index, g, w, "swiglu"), x, gates, weights)
            return y, pullback(cotangent)

        arguments = x, index, gates, weights, cotangent
        rows = P(EXPERT)
        spread = jax.jit(jax.shard_map(
            functools.partial(both, experts), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
        ))  # fmt: skip
        got, wanted = spread(*arguments), jax.jit(functools.partial(both, moe.reference))(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, wanted)
