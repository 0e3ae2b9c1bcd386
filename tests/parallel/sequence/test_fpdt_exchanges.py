"""What a layer in chunks computes while its heads are exchanged: nothing that waits for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention.intervals import IntervalAttention, attention_over_intervals
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.sequence.fpdt import strategy
from jaxscale.parallel.sequence.fpdt.cuts import Cuts
from jaxscale.parallel.sequence.fpdt.gradient import stream_layer
from jaxscale.parallel.sequence.fpdt.keys import Intervals
from jaxscale.parallel.sequence.fpdt.stream import Places, Stream, Tokens
from tests.parallel.comparison import KEY, dense, make_batch, make_loss, make_params, make_region

NUM = 3  # chunks, of one token


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def name_cotangent(name, x):
    """`x`, whose cotangent is named in the program."""
    return x


name_cotangent.defvjp(lambda name, x: (x, None), lambda name, _, dx: (checkpoint_name(dx, name),))


def mark(name, x):
    """`x`, named in the program as its cotangent is."""
    return name_cotangent(f"{name} back", checkpoint_name(x, name))


class MarkedAttention(IntervalAttention):
    """Attention whose output is named."""

    def forward(self, *arguments):
        part = super().forward(*arguments)
        return dataclasses.replace(part, o=mark("attend", part.o))


def layer(is_exchanged, chunks, attention):
    """A layer of one head, each of whose steps is named."""
    context = AttentionContext(jnp.zeros((1, 1), jnp.int32))
    q = jax.ShapeDtypeStruct((1, 1, 1, 8), "float32")
    backend = attention_over_intervals(q, context, implementation="reference")

    def project(params, x, known):
        return (mark("project", params * x[..., None, :]),) * 3

    return Stream(
        project=project,
        enter=lambda q, k, v: (mark("enter", q), k, v),
        leave=functools.partial(mark, "leave"),
        finish=lambda params, x, o, known, logits: (mark("finish", x + o[:, :, 0]), None),
        attention=MarkedAttention(**vars(backend)),
        chunks=Cuts(NUM),
        pieces=Cuts(1),
        places=Places(("device",) * NUM, attention, chunks),
        is_exchanged=is_exchanged,
    )


def causes(jaxpr):
    """(name, number of its kind) -> those named steps that it waits for, of a traced program."""
    found, behind, counts = {}, {}, {}
    for equation in jaxpr.eqns:
        inputs = [x for x in equation.invars if isinstance(x, jax.extend.core.Var)]
        waits_for = frozenset().union(*(behind.get(x, ()) for x in inputs))
        if equation.primitive.name == "name":
            name = equation.params["name"]
            step = name, counts.get(name, 0)
            counts[name] = step[1] + 1
            found[step] = waits_for
            waits_for |= {step}
        behind |= dict.fromkeys(equation.outvars, waits_for)
    return found


def steps_of(is_exchanged, chunks="device", attention="device"):
    """`causes` of a layer with its gradient."""
    stream = layer(is_exchanged, chunks, attention)
    last = np.arange(NUM, dtype=np.int32)[None]
    tokens = Tokens(None, Intervals(0 * last, last + 1))

    def total(params, x):
        return stream_layer(stream, params, x, tokens)[0].sum()

    return causes(jax.make_jaxpr(jax.grad(total))(jnp.ones(()), jnp.ones((1, NUM, 8))).jaxpr)


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_heads_are_exchanged_beside_the_feed_forward_of_the_chunk_before(is_exchanged):
    steps = steps_of(is_exchanged)
    for i in range(NUM - 1):
        assert (("finish", i) in steps["enter", i + 1]) != is_exchanged
        # Else the compiler could finish the chunk first, with nothing left to be beside.
        assert (("project", i + 1) in steps["finish", i]) == is_exchanged
        assert ("finish", i) not in steps["leave", i]


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_heads_are_exchanged_beside_attention_that_is_made_again(is_exchanged):
    steps = steps_of(is_exchanged, attention="nowhere")
    for i in range(NUM, 2 * NUM - 1):
        assert (("attend", i) in steps["enter", i + 1]) != is_exchanged
        assert (("project", i + 1) in steps["attend", i]) == is_exchanged
        assert ("leave", i) not in steps["attend", i + 1]


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_gradients_return_beside_the_feed_forward_s_backward_of_the_chunk_before(is_exchanged):
    steps = steps_of(is_exchanged)
    for i in range(NUM - 1):
        assert (("enter back", i) in steps["finish back", i + 1]) != is_exchanged
        # They are projected back beside the exchange of what that chunk's attention wants.
        assert (("finish back", i + 1) in steps["project back", i]) == is_exchanged
        assert ("project back", i) in steps["enter back", i + 1]


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_beside_keys_on_the_host_gradients_return_beside_the_next_projection(is_exchanged):
    steps = steps_of(is_exchanged, chunks="host")
    for i in range(NUM - 1):
        # Before them the forward projects all chunks, and the backward all queries.
        next_keys = "project", 2 * NUM + i + 1
        assert (("enter back", i) in steps[next_keys]) != is_exchanged
        assert (next_keys in steps["project back", i]) == is_exchanged
        assert ("project back", i) in steps["enter back", i + 1]


@pytest.mark.parametrize(("sequence", "is_exchanged"), [(1, False), (2, True)])
def test_a_sequence_that_is_shared_out_exchanges_heads(monkeypatch, sequence, is_exchanged):
    built = []

    def spy(stream, *arguments):
        built.append(stream.is_exchanged)
        return stream_layer(stream, *arguments)

    monkeypatch.setattr(strategy, "stream_layer", spy)
    model, chunks = dense(num_layers=1), strategy.FullyPipelined(chunk_tokens=8)
    mesh = MeshConfig(sequence=sequence, zero=0)
    region = make_region(model, mesh, dtype="float32", strategy=chunks)
    gradient = region.gradient(make_loss(model, "float32", remat="none", strategy=chunks))
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), make_params(model))
    jax.eval_shape(gradient, params, make_batch(), KEY)
    assert built and set(built) == {is_exchanged}
