"""The vocabulary-parallel look-up and loss and rows by member, value and gradient, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import parameter_table
from jaxscale.ops import loss
from jaxscale.ops.operations import Operations
from jaxscale.parallel import tensor
from jaxscale.parallel.mesh import AXES, TENSOR, MeshConfig, make_mesh
from jaxscale.parallel.region import make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.types import InputError

MODEL = ModelConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=16,
)
B, T, V, D, SHARDS = 2, 8, 12, 6, 4
RNG = np.random.default_rng(0)
OWN = P(
    None, TENSOR
)  # residual and figures of the own tokens, in an order of its own: see `in_order`


def on_mesh(function, in_specs, out_specs):
    mesh = make_mesh(MeshConfig(tensor=SHARDS), jax.devices()[:SHARDS])
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


def in_order(x):
    """Own tokens [B, T / tensor, ...] of all devices, side by side along T, as the rows [B, T, ...] they come from."""
    by_device = jnp.moveaxis(x.reshape(len(x), SHARDS, T // SHARDS, *x.shape[2:]), 1, 0)
    return by_device.reshape(x.shape)


def of_devices(x):
    """The inverse of `in_order`."""
    by_device = jnp.moveaxis(x.reshape(SHARDS, len(x), T // SHARDS, *x.shape[2:]), 0, 1)
    return by_device.reshape(x.shape)


def test_look_up():
    with jax.enable_x64(True):
        table, tokens = (
            jnp.asarray(RNG.normal(size=(V, D))),
            jnp.asarray(RNG.integers(0, V, (B, T))),
        )
        tokens = tokens.at[0, :2].set(jnp.array([-1, V]))
        cotangent = jnp.asarray(RNG.normal(size=(B, T, D)))

        def both(embed, table, tokens, cotangent):
            x, pullback = jax.vjp(lambda t: embed(t, tokens), table)
            return x, pullback(cotangent)[0]

        run = on_mesh(
            functools.partial(both, tensor.embed), (P(TENSOR), P(), OWN), (OWN, P(TENSOR))
        )
        x, gradient = run(table, tokens, of_devices(cotangent))
        wanted = both(Operations().embed, table, tokens, cotangent)
        jax.tree.map(np.testing.assert_allclose, (in_order(x), gradient), wanted)


def test_token_loss():
    """With logits whose exponential overflows, a label on every shard and two outside the vocabulary."""
    with jax.enable_x64(True):
        logits = (
            jnp.asarray(RNG.normal(size=(B, T, V)))
            * jnp.array([1, 1, 10, 100, 1e3, 1e4, 1e5, 0])[:, None]
        )
        labels = (
            jnp.asarray(RNG.permutation(np.arange(B * T) % V).reshape(B, T))
            .at[0, :2]
            .set(jnp.array([-100, V]))
        )
        cotangents = tuple(jnp.asarray(RNG.normal(size=(B, T))) for _ in range(2))

        def both(token_loss, logits, labels, cotangents):
            values, pullback = jax.vjp(
                lambda x: token_loss(x, jnp.eye(x.shape[-1]), labels), logits
            )
            return values, pullback(cotangents)[0]

        columns = P(None, None, TENSOR)
        run = on_mesh(
            functools.partial(both, tensor.token_loss), (columns, P(), OWN), (OWN, columns)
        )
        figures, gradient = run(logits, labels, tuple(map(of_devices, cotangents)))
        wanted = both(loss.token_loss, logits, labels, cotangents)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
            (tuple(map(in_order, figures)), gradient),
            wanted,
        )


def test_enter_and_exit_are_each_other_s_transpose():
    """<enter(x), y> = <x, exit(y)>, summed over the group; a bare psum would give this times the axis size."""
    x, y = jnp.asarray(RNG.normal(size=(B, T, D))), jnp.asarray(RNG.normal(size=(SHARDS, B, T, D)))

    def products(x, y):
        entered, pullback = jax.vjp(tensor.gather_tokens, x)
        left = (entered * y[0]).sum()
        right = (x * tensor.reduce_scatter_tokens(y[0])).sum()
        error = jnp.abs(pullback(y[0])[0] - tensor.reduce_scatter_tokens(y[0])).max()
        return lax.psum(left, AXES), lax.psum(right, AXES), lax.psum(error, AXES)

    left, right, error = on_mesh(products, (OWN, P(TENSOR)), P())(x, y)
    np.testing.assert_allclose(left, right, rtol=1e-4)
    assert error < 1e-6


def test_own_tokens_are_equal_shares_of_the_rows_one_after_the_other():
    x = jnp.arange(B * T).reshape(B, T)
    own = on_mesh(tensor.own_tokens, (P(),), OWN)(x)
    np.testing.assert_array_equal(own[:, : T // SHARDS].ravel(), np.arange(B * T // SHARDS))
    np.testing.assert_array_equal(in_order(own), x)


def test_own_tokens_are_those_that_enter_and_exit_exchange():
    x = jnp.asarray(RNG.normal(size=(B, T, D)))
    for function in (
        lambda x: tensor.gather_tokens(tensor.own_tokens(x)),
        lambda x: tensor.gather_tokens(tensor.reduce_scatter_tokens(x) / SHARDS),
    ):
        np.testing.assert_allclose(on_mesh(function, (P(),), P())(x), x, rtol=1e-6)


@pytest.mark.parametrize(
    "num_rows", [SHARDS, 2 * SHARDS, 2]
)  # of two rows no member has a whole one
def test_rows_by_member_equal_all_at_once(num_rows):
    """Of a function that knows its rows, value and gradients: of the residual, of weights cut either way, and whole."""
    sizes = dict(
        x=(num_rows, T, D), into=(D, V), out=(V, D), scale=(D,), cotangent=(num_rows, T, D)
    )
    with jax.enable_x64(True):
        x, into, out, scale, cotangent = (
            jnp.asarray(RNG.normal(size=size)) for size in sizes.values()
        )
        positions = jnp.asarray(RNG.normal(size=(num_rows, T)))

        def run(operations, x, into, out, scale):
            def f(h, positions):
                return jnp.sin(jnp.cumsum(scale * h * positions[..., None], 1) @ into), None

            return operations.between(f, lambda hidden: hidden @ out, x, positions)[0]

        def both(operations, *arguments):
            y, pullback = jax.vjp(functools.partial(run, operations), *arguments[:-1])
            x, into, out, scale = pullback(arguments[-1])
            return y, x, into, out, operations.total(scale)

        operations = Operations(
            between=tensor.column_then_row_by_member, total=tensor.sum_over_tokens
        )
        cut = (OWN, P(None, TENSOR), P(TENSOR))
        mapped = on_mesh(functools.partial(both, operations), (*cut, P(), OWN), (OWN, *cut, P()))
        found = mapped(of_devices(x), into, out, scale, of_devices(cotangent))
        wanted = both(Operations(), x, into, out, scale, cotangent)
        for got, want, is_own in zip(found, wanted, (True, True, False, False, False), strict=True):
            np.testing.assert_allclose(
                in_order(got) if is_own else got, want, rtol=1e-10, atol=1e-10
            )


def test_sums_of_many_members_are_taken_in_float32():
    """256 and four halves are 258; in bfloat16, one after the other, each would be rounded away."""
    x, parts = (
        jnp.ones((SHARDS, T // SHARDS, 1), "bfloat16"),
        jnp.array([256, 0.5, 0.5, 1], "bfloat16"),
    )

    def run(x):
        part = parts[lax.axis_index(TENSOR)]
        return tensor.column_then_row_by_member(
            lambda h: (h, None), lambda hidden: part * hidden, x
        )[0]

    np.testing.assert_array_equal(on_mesh(run, (P(),), P())(x), 258)


def test_a_pipeline_exchanges_all_at_once():
    """In a branch that one stage takes alone a permute is wrong on CPUs."""
    table = parameter_table(MODEL)
    for pipeline, between in ((1, tensor.column_then_row_by_member), (2, tensor.column_then_row)):
        mesh = MeshConfig(pipeline=pipeline, tensor=2)
        operations = make_operations(
            mesh, make_specs(table, mesh), attention=None, reduction="float32"
        )
        assert operations.between is between


def test_what_rows_would_keep_is_refused():
    """A cache would come back in pieces."""
    run = on_mesh(
        lambda x: tensor.column_then_row_by_member(lambda h: (h, h), lambda y: y, x)[0], (P(),), P()
    )
    with pytest.raises(InputError, match="cache"):
        run(jnp.ones((SHARDS, T // SHARDS, D)))


def test_one_device_exchanges_nothing():
    """Else XLA hides a matmul's output from the addition that follows, and copies the residual."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    there_and_back = jax.shard_map(
        lambda x: tensor.reduce_scatter_tokens(tensor.gather_tokens(x)),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
    )
    program = str(jax.make_jaxpr(there_and_back)(jnp.ones((B, T, D))))
    assert "gather" not in program and "scatter" not in program
