"""Experts spread over devices against all of them on one, also where the routing is extreme."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxscale.ops import moe
from jaxscale.ops.draws import Dropout
from jaxscale.parallel.expert import experts, make_experts, tensor_experts
from jaxscale.parallel.mesh import EXPERT, TENSOR, MeshConfig, make_mesh

B, T, D, F, E = 4, 6, 5, 7, 8
RNG = np.random.default_rng(0)


def permuted(choices, num_active=2):
    by_token = [RNG.permutation(choices)[:num_active] for _ in range(B * T)]
    return np.stack(by_token).reshape(B, T, num_active)


ROUTINGS = {
    "random": permuted(E),
    "three_of_two_local": permuted(E, 3),
    "all_tokens_to_one_expert": np.full((B, T, 1), 5),
    "all_tokens_to_one_device": np.broadcast_to([6, 7], (B, T, 2)),
    "a_device_without_tokens": permuted([0, 1, 4, 5, 6, 7]),
    "each_device_to_the_next": np.repeat(np.arange(2, 10) % E, 6).reshape(B, T, 2),
}
VARIANTS = {"expert": experts, "tensor": tensor_experts}


@functools.cache
def spread(variant, function):
    """`function(experts, x, index, gates, weights, cotangent)` on four devices.

    Routings share the compilation.
    """
    axis = TENSOR if variant == "tensor" else EXPERT
    mesh = make_mesh(MeshConfig(**{axis: 4}), jax.devices()[:4])
    rows = P() if variant == "tensor" else P(EXPERT)

    def local(x, index, gates, weights, cotangent):
        y, (dx, dgates, dweights) = function(VARIANTS[variant], x, index, gates, weights, cotangent)
        if variant == "tensor":  # parts of sums
            y, dx, dgates = lax.psum((y, dx, dgates), TENSOR)
        return y, (dx, dgates, dweights)

    in_specs, out_specs = (rows, rows, rows, P(axis), rows), (rows, (rows, rows, P(axis)))
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


def forward_and_backward(activation, function, x, index, gates, weights, cotangent):
    y, pullback = jax.vjp(lambda x, g, w: function(x, index, g, w, activation), x, gates, weights)
    return y, pullback(cotangent)


both = {name: functools.partial(forward_and_backward, name) for name in ("swiglu", "gelu")}
reference = jax.jit(functools.partial(both["swiglu"], moe.reference))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_and_gradients_equal_one_device(routing, variant):
    """Outputs, and gradients of tokens, gates and each expert's matrices."""
    index = jnp.asarray(ROUTINGS[routing])
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        weights = {
            name: jnp.asarray(rng.normal(size=(E, *shape)))
            for name, shape in {"up": (D, F), "gate": (D, F), "down": (F, D)}.items()
        }
        x, cotangent = (jnp.asarray(rng.normal(size=(B, T, D))) for _ in range(2))
        gates = jnp.asarray(rng.uniform(size=index.shape))
        arguments = x, index, gates, weights, cotangent
        got, wanted = spread(variant, both["swiglu"])(*arguments), reference(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_choice_is_computed_exactly_once(routing, variant):
    """Expert e gives 10^e for any token, so a token's output spells how often each ran on it.

    The gradient of an expert's last matrix is the number of rows that it ran on.
    """
    index = ROUTINGS[routing]
    counts = np.stack([(index == e).sum(-1) for e in range(E)], -1)
    with jax.enable_x64(True):
        one = jax.nn.gelu(jnp.float64(1.0))
        weights = {"up": jnp.ones((E, 1, 1)), "down": (10.0 ** jnp.arange(E) / one)[:, None, None]}
        ones = jnp.ones((B, T, 1))
        y, (_, _, gradients) = spread(variant, both["gelu"])(
            ones, jnp.asarray(index), jnp.ones(index.shape), weights, ones
        )
        np.testing.assert_allclose(y[..., 0], counts @ 10.0 ** np.arange(E), rtol=1e-12)
        np.testing.assert_allclose(gradients["down"][:, 0, 0] / one, counts.sum((0, 1)), rtol=1e-12)
        assert gradients["down"].sum() / one == pytest.approx(index.size)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_of_dropout_travel_with_their_rows(variant):
    """Only the forward: what is dropped there is dropped in the backward."""
    index = jnp.asarray(ROUTINGS["random"])
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        keys = jnp.asarray(rng.integers(0, 2**32, (*index.shape, 2)), jnp.uint32)
        shapes = {"up": (E, D, F), "down": (E, F, D)}
        weights = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        x = jnp.asarray(rng.normal(size=(B, T, D)))
        gates = jnp.asarray(rng.uniform(size=index.shape))

        def forward(function, x, index, gates, weights, keys):
            y = function(x, index, gates, weights, "gelu", None, Dropout(keys, 0.4))
            return y, (x, gates, weights)

        got = spread(variant, forward)(x, index, gates, weights, keys)[0]
        wanted = moe.reference(x, index, gates, weights, "gelu", None, Dropout(keys, 0.4))
        np.testing.assert_allclose(got, wanted, atol=1e-12)


@jax.custom_vjp
def undefined_gradient_past(rows, used):
    return rows


undefined_gradient_past.defvjp(
    lambda rows, used: (rows, used), lambda used, dx: (undefined_past(dx, used), None)
)


def undefined_past(rows, used):
    return jnp.where(jnp.arange(len(rows))[:, None] < used, rows, jnp.nan)


def test_what_a_kernel_leaves_undefined_reaches_nobody(monkeypatch):
    """Rows past the last expert's, in the output and in the gradient."""

    def grouped_ffn(rows, sizes, *arguments, needs_tail):
        assert not needs_tail
        rows = undefined_gradient_past(rows, sizes.sum())
        return undefined_past(moe.grouped_ffn(rows, sizes, *arguments), sizes.sum())

    monkeypatch.setattr("jaxscale.parallel.expert.grouped_ffn", grouped_ffn)
    spread_anew = functools.partial(both["swiglu"])  # compiled with this `grouped_ffn`
    index = jnp.asarray(ROUTINGS["random"])
    rng = np.random.default_rng(4)
    shapes = {"up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)}
    with jax.enable_x64(True):
        weights = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        x, gates = jnp.asarray(rng.normal(size=(B, T, D))), jnp.ones(index.shape)
        arguments = x, index, gates, weights, x
        got, wanted = spread("expert", spread_anew)(*arguments), reference(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_grouped_matmul_gets_no_more_rows_than_there_are(variant, monkeypatch):
    """Empty rows of the worst-case buffers lie past the last expert's."""
    seen = []

    def grouped_ffn(rows, group_sizes, weights, activation, dropout, tile=None, needs_tail=True):
        jax.debug.callback(lambda sizes: seen.append(int(sizes.sum())), group_sizes)
        return rows

    monkeypatch.setattr("jaxscale.ops.moe.grouped_ffn", grouped_ffn)
    monkeypatch.setattr("jaxscale.parallel.expert.grouped_ffn", grouped_ffn)
    index = jnp.asarray(ROUTINGS["random"])
    weights = {"up": jnp.ones((E, D, F)), "down": jnp.ones((E, F, D))}

    def forward(function, x, index, gates, weights, cotangent):
        return function(x, index, gates, weights, "gelu"), (x, gates, weights)

    x = jnp.ones((B, T, D))
    jax.block_until_ready(spread(variant, forward)(x, index, jnp.ones(index.shape), weights, x))
    jax.effects_barrier()
    assert len(seen) == 4 and sum(seen) == index.size


def test_the_mesh_chooses():
    assert make_experts(MeshConfig(expert=2)) is experts
    assert make_experts(MeshConfig(tensor=2, expert_axis="tensor")) is tensor_experts
    assert make_experts(MeshConfig(tensor=2)) is make_experts(MeshConfig()) is moe.experts
