"""Tensor-parallel operations, value and gradient, against one device; those of serving, values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.models.config.facts import from_flat
from jaxscale.models.parameters import parameter_table
from jaxscale.ops import loss
from jaxscale.ops.backends import Backends
from jaxscale.ops.collectives import Collectives
from jaxscale.parallel import tensor
from jaxscale.parallel.mesh import AXES, TENSOR, MeshConfig, make_mesh
from jaxscale.parallel.region import make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.types import InputError
from tests.parallel.comparison import dense, make_batch, make_loss, make_params, make_region

MODEL = from_flat(
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
# Of the residual and of figures for each token. Side by side the shares are not in the order of the
# batch: see `in_order`.
OWN = P(None, TENSOR)


def on_mesh(function, in_specs, out_specs, num_members=SHARDS):
    mesh = make_mesh(MeshConfig(tensor=num_members), jax.devices()[:num_members])
    shared = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )
    return jax.jit(shared)


def in_order(x):
    """Shares [B, T / tensor, ...] side by side along T to the rows [B, T, ...] they come from."""
    by_device = jnp.moveaxis(x.reshape(len(x), SHARDS, T // SHARDS, *x.shape[2:]), 1, 0)
    return by_device.reshape(x.shape)


def of_devices(x):
    """The inverse of `in_order`."""
    by_device = jnp.moveaxis(x.reshape(SHARDS, len(x), T // SHARDS, *x.shape[2:]), 0, 1)
    return by_device.reshape(x.shape)


def test_look_up():
    with jax.enable_x64(True):
        table = jnp.asarray(RNG.normal(size=(V, D)))
        tokens = jnp.asarray(RNG.integers(0, V, (B, T)))
        tokens = tokens.at[0, :2].set(jnp.array([-1, V]))
        cotangent = jnp.asarray(RNG.normal(size=(B, T, D)))

        def both(embed, table, tokens, cotangent):
            x, pullback = jax.vjp(lambda t: embed(t, tokens), table)
            return x, pullback(cotangent)[0]

        share = P(TENSOR)
        run = on_mesh(functools.partial(both, tensor.embed), (share, P(), OWN), (OWN, share))
        x, gradient = run(table, tokens, of_devices(cotangent))
        plain = jax.jit(functools.partial(both, Backends().embed))
        wanted = plain(table, tokens, cotangent)
        jax.tree.map(np.testing.assert_allclose, (in_order(x), gradient), wanted)


def test_a_frequent_token_gets_its_whole_gradient_in_bfloat16():
    """A sum in bfloat16 would stop growing at 256."""

    def gradient(table, tokens):
        return jax.grad(lambda table: tensor.embed(table, tokens).astype("float32").sum())(table)

    run = on_mesh(gradient, (P(TENSOR), P()), P(TENSOR))
    found = run(jnp.ones((V, D), "bfloat16"), jnp.zeros((1, 1024), int))
    np.testing.assert_array_equal(found[0], 1024)


def test_token_loss():
    """Logits whose exponential overflows, a label on every shard, two outside the vocabulary."""
    with jax.enable_x64(True):
        size = jnp.array([1, 1, 10, 100, 1e3, 1e4, 1e5, 0])[:, None]
        logits = size * jnp.asarray(RNG.normal(size=(B, T, V)))
        labels = RNG.permutation(np.arange(B * T) % V).reshape(B, T)
        labels[0, :2] = -100, V
        labels = jnp.asarray(labels)
        cotangents = tuple(jnp.asarray(RNG.normal(size=(B, T))) for _ in range(2))

        def both(token_loss, logits, labels, cotangents):
            def of_logits(x):
                return token_loss(x, jnp.eye(x.shape[-1]), labels)

            values, pullback = jax.vjp(of_logits, logits)
            return values, pullback(cotangents)[0]

        columns = P(None, None, TENSOR)
        shared = functools.partial(both, tensor.token_loss)
        run = on_mesh(shared, (columns, P(), OWN), (OWN, columns))
        figures, gradient = run(logits, labels, tuple(map(of_devices, cotangents)))
        plain = jax.jit(functools.partial(both, loss.token_loss))
        assert_close(
            (tuple(map(in_order, figures)), gradient),
            plain(logits, labels, cotangents),
        )


@pytest.mark.parametrize("num_forbidden", [1, 3, V])
def test_token_loss_with_forbidden_words(num_forbidden):
    """Also all of a member, or of all members; a label that is forbidden has no gradient."""
    with jax.enable_x64(True):
        h = jnp.asarray(RNG.normal(size=(B, T, D)))
        matrix = jnp.asarray(RNG.normal(size=(V, D)))
        bias = jnp.asarray(RNG.normal(size=V)).at[:num_forbidden].set(-jnp.inf)
        labels = jnp.asarray(RNG.permutation(np.arange(B * T) % V).reshape(B, T))

        def both(token_loss, h, matrix, bias):
            def of_head(matrix, bias):
                return token_loss(h, loss.Head(matrix, bias), labels)

            values, pullback = jax.vjp(of_head, matrix, bias)
            return values, pullback(tuple(map(jnp.ones_like, values)))

        rows = P(TENSOR)
        shared = functools.partial(both, tensor.token_loss)
        run = on_mesh(shared, (P(), rows, rows), (OWN, rows))
        figures, gradients = run(h, matrix, bias)
        plain = jax.jit(functools.partial(both, loss.token_loss))
        values, wanted = plain(h, matrix, bias)
        assert_close(tuple(map(in_order, figures)), values)
        assert_close(gradients, wanted)
        assert all(np.isfinite(each).all() for each in gradients)
        nll, _ = values
        np.testing.assert_array_equal(nll == np.inf, labels < num_forbidden)


def assert_close(got, wanted):
    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)

    jax.tree.map(one, got, wanted)


def test_gather_and_reduce_scatter_are_each_other_s_transpose():
    """<gather(x), y> = <x, reduce_scatter(y)>, summed over the group.

    A bare psum would give this times the axis size.
    """
    x = jnp.asarray(RNG.normal(size=(B, T, D)))
    y = jnp.asarray(RNG.normal(size=(SHARDS, B, T, D)))

    def products(x, y):
        gathered, pullback = jax.vjp(tensor.gather_tokens, x)
        scattered = tensor.reduce_scatter_tokens(y[0])
        left = (gathered * y[0]).sum()
        right = (x * scattered).sum()
        error = jnp.abs(pullback(y[0])[0] - scattered).max()
        return lax.psum(left, AXES), lax.psum(right, AXES), lax.psum(error, AXES)

    left, right, error = on_mesh(products, (OWN, P(TENSOR)), P())(x, y)
    np.testing.assert_allclose(left, right, rtol=1e-4)
    assert error < 1e-6


def test_own_tokens_are_equal_shares_of_the_rows_one_after_the_other():
    x = jnp.arange(B * T).reshape(B, T)
    own = on_mesh(tensor.own_tokens, (P(),), OWN)(x)
    np.testing.assert_array_equal(own[:, : T // SHARDS].ravel(), np.arange(B * T // SHARDS))
    np.testing.assert_array_equal(in_order(own), x)


def test_own_tokens_are_those_that_gather_and_reduce_scatter_exchange():
    x = jnp.asarray(RNG.normal(size=(B, T, D)))

    def there_and_back(x):
        own = tensor.gather_tokens(tensor.own_tokens(x))
        scattered = tensor.gather_tokens(tensor.reduce_scatter_tokens(x) / SHARDS)
        return own, scattered

    for found in on_mesh(there_and_back, (P(),), P())(x):
        np.testing.assert_allclose(found, x, rtol=1e-6)


# Of two rows no member has a whole one.
@pytest.mark.parametrize("num_rows", [SHARDS, 2 * SHARDS, 2])
def test_rows_by_member_equal_all_at_once(num_rows):
    """Of a function that depends on the row, value and gradients.

    These are of the residual, of weights sharded either way, and of replicated ones.
    """
    shapes = [(num_rows, T, D), (D, V), (V, D), (D,), (num_rows, T, D)]
    with jax.enable_x64(True):
        x, into, out, scale, cotangent = (jnp.asarray(RNG.normal(size=shape)) for shape in shapes)
        positions = jnp.asarray(RNG.normal(size=(num_rows, T)))

        def run(collectives, x, into, out, scale):
            def column(h, positions):
                weighted = scale * h * positions[..., None]
                return jnp.sin(jnp.cumsum(weighted, 1) @ into), None

            def row(hidden):
                return hidden @ out

            return collectives.column_then_row(column, row, x, positions)[0]

        def both(collectives, *arguments):
            *inputs, cotangent = arguments
            y, pullback = jax.vjp(functools.partial(run, collectives), *inputs)
            dx, dinto, dout, dscale = pullback(cotangent)
            return y, dx, dinto, dout, collectives.sum_over_tokens(dscale)

        collectives = Collectives(
            column_then_row=tensor.column_then_row_by_member,
            sum_over_tokens=tensor.sum_over_tokens,
        )
        shared = functools.partial(both, collectives)
        specs = (OWN, P(None, TENSOR), P(TENSOR))
        mapped = on_mesh(shared, (*specs, P(), OWN), (OWN, *specs, P()))
        found = mapped(of_devices(x), into, out, scale, of_devices(cotangent))
        y, dx, *dweights = found
        plain = jax.jit(functools.partial(both, Collectives()))
        wanted = plain(x, into, out, scale, cotangent)
        for got, want in zip((in_order(y), in_order(dx), *dweights), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_sums_of_many_members_are_taken_in_float32():
    """256 + 0.5 + 0.5 + 1 = 258; in bfloat16, one by one, the small terms would be rounded away."""
    x = jnp.ones((SHARDS, T // SHARDS, 1), "bfloat16")
    parts = jnp.array([256, 0.5, 0.5, 1], "bfloat16")

    def run(x):
        part = parts[lax.axis_index(TENSOR)]

        def row(hidden):
            return part * hidden

        return tensor.column_then_row_by_member(lambda h: (h, None), row, x)[0]

    np.testing.assert_array_equal(on_mesh(run, (P(),), P())(x), 258)


def test_a_pipeline_exchanges_all_at_once():
    """In a branch that one stage takes alone a permute is wrong on CPUs."""
    table = parameter_table(MODEL)
    for pipeline, wanted in ((1, tensor.column_then_row_by_member), (2, tensor.column_then_row)):
        mesh = MeshConfig(pipeline=pipeline, tensor=2)
        specs = make_specs(table, mesh)
        operations = make_operations(mesh, specs, attention=None, reduction="float32")
        assert operations.collectives.column_then_row is wanted


def test_what_rows_would_keep_is_refused():
    """A cache would come back in pieces."""

    def keep(x):
        return tensor.column_then_row_by_member(lambda h: (h, h), lambda y: y, x)[0]

    with pytest.raises(InputError, match="cache"):
        on_mesh(keep, (P(),), P())(jnp.ones((SHARDS, T // SHARDS, D)))


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


@pytest.mark.parametrize("stride", [2, 4])
def test_heads_keep_the_layout_of_blocks_that_their_number_gives_them(stride):
    """Of four heads on two members; a stride of four would give both the first two patterns."""
    model = dense(num_layers=1)
    attention = dataclasses.replace(model.pattern[0].attention, layout=BlockLayout(1, stride))
    layer = dataclasses.replace(model.pattern[0], attention=attention)
    model = dataclasses.replace(model, pattern=(layer,))
    run = make_region(model, MeshConfig(tensor=2)).evaluate(make_loss(model, "float32"))
    arguments = make_params(model), make_batch(), jax.random.key(0)
    if stride == 2:
        jax.eval_shape(run, *arguments)
        return
    with pytest.raises(InputError, match=r"num_heads % \(tensor \* stride\) == 0"):
        jax.eval_shape(run, *arguments)


# Serving: the residual is replicated.


@pytest.mark.parametrize("num_members", [2, 4])
def test_a_replicated_residual_goes_through_column_and_row_parallel_matmuls(num_members):
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=(B, T, D)))
        into = jnp.asarray(RNG.normal(size=(D, V)))
        out = jnp.asarray(RNG.normal(size=(V, D)))

        def feed_forward(x, into, out):
            hidden = jnp.sin(x @ into)
            return tensor.sum_partial(hidden @ out)

        specs = (P(), P(None, TENSOR), P(TENSOR))
        found = on_mesh(feed_forward, specs, P(), num_members)(x, into, out)
        assert_close(found, jnp.sin(x @ into) @ out)


@pytest.mark.parametrize("num_members", [2, 4])
def test_a_look_up_to_the_replicated_residual(num_members):
    """With tokens of every share, and outside the vocabulary."""
    table = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
    tokens = jnp.arange(-2, B * T - 2).reshape(B, T)
    run = on_mesh(tensor.embed_replicated, (P(TENSOR), P()), P(), num_members)
    np.testing.assert_array_equal(run(table, tokens), Backends().embed(table, tokens))


@pytest.mark.parametrize("num_members", [2, 4])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits_of_the_whole_vocabulary(num_members, has_bias, softcap):
    with jax.enable_x64(True):
        h = jnp.asarray(RNG.normal(size=(B, T, D)))
        head = jnp.asarray(RNG.normal(size=(V, D)))
        if has_bias:
            head = loss.Head(head, jnp.asarray(RNG.normal(size=V)))
        shared = functools.partial(tensor.logits, softcap=softcap)
        found = on_mesh(shared, (P(), P(TENSOR)), P(), num_members)(h, head)
        assert_close(found, loss.unembed(h, head, softcap))


def test_logits_are_in_float32_at_least():
    """Gathered in the type of the matmul's sums: rounded to bfloat16, many would be ties."""
    h = jnp.ones((B, 1, D), jnp.bfloat16)
    head = jnp.ones((V, D), jnp.bfloat16)
    run = on_mesh(tensor.logits, (P(), P(TENSOR)), P(), 2)
    assert jax.eval_shape(run, h, head).dtype == jnp.float32
