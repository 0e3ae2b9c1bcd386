"""Layers in chunks: loss and every gradient equal whole layers', wherever what is kept rests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.checkpoint.manager import CheckpointConfig
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.models.config.lora import LoraConfig
from jaxscale.models.execution import ExecutionConfig, Whole
from jaxscale.ops.attention import AttentionContext, intervals_chunked
from jaxscale.ops.attention.intervals import IntervalAttention, attention_over_intervals
from jaxscale.ops.rotary import LongRopeScaling
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.sequence.fpdt.by_keys import _Queries
from jaxscale.parallel.sequence.fpdt.cuts import Cuts
from jaxscale.parallel.sequence.fpdt.gradient import stream_layer
from jaxscale.parallel.sequence.fpdt.keys import Intervals
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.fpdt.stream import Places, Stream, Tokens
from jaxscale.parallel.sequence.layout import Chunked
from jaxscale.run.fit import check_fit
from jaxscale.run.run import Run
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import make_setup
from jaxscale.types import InputError
from tests.parallel.comparison import (
    KEY,
    assert_equal_to_single_device,
    canonical,
    dense,
    gradient_on_mesh,
    make_batch,
    make_loss,
    make_params,
    mixture,
    on_mesh,
    single_device,
)

T = 32  # of the batches that are compared


def richest():
    """A layer with a window, a soft-cap, LongRoPE's two lists, drawn experts and dropout."""
    model = mixture(
        num_layers=1,
        moe_pattern=(True,),
        windows=(5,),
        max_length=T,
        attention_softcap=2.0,
        router="sparsemixer_v2",
        router_threshold=0.8,
        expert_dropout=0.3,
    )
    # Documents of more than 12 tokens have the second list.
    scaling = LongRopeScaling((1.0, 2.0, 3.0, 4.0), 1.0, (4.0, 3.0, 2.0, 1.0), 1.2, 12)
    (layer,) = model.pattern
    rotary = dataclasses.replace(layer.attention.rotary, scaling=scaling)
    attention = dataclasses.replace(layer.attention, rotary=rotary)
    return dataclasses.replace(model, pattern=(dataclasses.replace(layer, attention=attention),))


DENSE = dense(num_layers=2, max_length=T)
ADAPTED = dense(num_layers=1, max_length=T, lora=LoraConfig(2))
MOE = mixture(num_layers=2, max_length=T)
RICH_LAYER = richest()
DEEP_MOE = mixture(num_layers=4, max_length=T)  # two periods, one for each of two stages
MODELS = {
    "dense": DENSE,
    "adapted": ADAPTED,
    "moe": MOE,
    "rich moe": RICH_LAYER,
    "deep moe": DEEP_MOE,
}
ON_HOST, TWICE = dict(chunks="host"), dict(attention="nowhere")
ON_DEVICE = dict(inputs="device", attention="device", chunks="device")
KEYS_ON_DEVICE = dict(chunks="device")
# Packed documents, padding, and rows without any token that counts are in every batch.
MESHES = [
    ("rich moe", 4, dict(sequence=2), dict(num_pieces=1) | TWICE),
    ("dense", 4, dict(sequence=2), KEYS_ON_DEVICE),
    ("adapted", 2, dict(), dict(num_pieces=1) | KEYS_ON_DEVICE),
    *[
        pytest.param(
            "dense",
            num_chunks,
            dict(sequence=sequence, data=2),
            dict(num_pieces=1) | places,
            marks=pytest.mark.long,
        )
        for num_chunks in (1, 2, 4, 8)
        for sequence in (1, 2, 4)
        for places in (ON_HOST, ON_DEVICE)
    ],
    *[
        pytest.param("dense", 4, dict(sequence=2), places, marks=pytest.mark.long)
        for places in (TWICE, TWICE | KEYS_ON_DEVICE, dict(device_input_bytes=2 * T * 16 * 8))
    ],
    pytest.param(
        "deep moe", 2, dict(pipeline=2), dict(num_pieces=1) | ON_DEVICE, marks=pytest.mark.long
    ),
    *[
        pytest.param(
            name,
            2,
            dict(pipeline=2) | sizes,
            dict(num_pieces=1) | ON_DEVICE,
            marks=pytest.mark.long,
        )
        for name, sizes in (
            ("dense", dict(sequence=2)),
            ("dense", dict(tensor=2, num_microbatches=8)),
            ("dense", dict(tensor=2, sequence=2, num_microbatches=8)),
            ("deep moe", dict(sequence=2)),
            ("deep moe", dict(tensor=2, num_microbatches=8)),
            ("deep moe", dict(expert=2)),
        )
    ],
    *[
        pytest.param(name, 2, sizes, places, marks=pytest.mark.long)
        for name, sizes, places in (
            ("rich moe", dict(sequence=2, expert=2), KEYS_ON_DEVICE),
            ("moe", dict(sequence=2, expert=2), KEYS_ON_DEVICE),
            ("moe", dict(tensor=2, data=2, num_microbatches=4), ON_HOST),
            ("moe", dict(tensor=2, data=2, num_microbatches=4), KEYS_ON_DEVICE),
            ("dense", dict(tensor=2, sequence=2, num_microbatches=8), ON_HOST),
            ("dense", dict(tensor=2, sequence=2, num_microbatches=8), KEYS_ON_DEVICE),
            ("moe", dict(sequence=2, zero=1, zero_axes=("data",)), ON_HOST),
            ("deep moe", dict(sequence=2, checkpoint_every=2, checkpoint_place="host"), ON_HOST),
        )
    ],
]


@pytest.mark.parametrize(("name", "num_chunks", "sizes", "settings"), MESHES, ids=str)
def test_loss_and_every_gradient_equal_those_of_whole_layers(name, num_chunks, sizes, settings):
    model = MODELS[name]
    strategy = FullyPipelined(chunk_tokens=T // num_chunks, **settings)
    settings = dict(zero=3, num_microbatches=2) | sizes
    num_microbatches = settings["num_microbatches"] if "moe" in name else 1
    with jax.enable_x64(True):
        wanted = single_device(model, num_microbatches, length=T)
        result = on_mesh(model, strategy=strategy, remat="none", length=T, **settings)
        assert_equal_to_single_device(result, wanted, length=T)


@pytest.mark.parametrize(
    "settings", [KEYS_ON_DEVICE, pytest.param(ON_HOST, marks=pytest.mark.long)], ids=str
)
def test_attention_by_blocks_makes_the_same_gradients(settings, monkeypatch):
    """Chunks of 8 tokens in blocks of 3, as long chunks are attended where no kernel runs."""
    monkeypatch.setattr(intervals_chunked, "BLOCK", 3)
    strategy = FullyPipelined(chunk_tokens=8, num_pieces=1, **settings)
    with jax.enable_x64(True):
        wanted = single_device(RICH_LAYER, 2, length=T)
        result = on_mesh(
            RICH_LAYER, strategy=strategy, remat="none", length=T, zero=0, num_microbatches=2
        )
        assert_equal_to_single_device(result, wanted, length=T)


def copied(jaxpr, space):
    """Elements that a layer of a traced program copies to a space of memory."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put":
            pairs = zip(equation.params["devices"], equation.outvars, strict=True)
            found += sum(x.aval.size for where, x in pairs if where == space)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += copied(inner, space) if hasattr(inner, "eqns") else 0
    return found


# Of 8 rows of 16 tokens: inputs, outputs with their lse, and of 3 of 4 chunks keys and values.
INPUTS, OUTPUTS, KEYS = 8 * 16 * 16, 8 * 16 * 4 * (8 + 1), 3 * 8 * 4 * 2 * (2 * 8)
QUERIES = 8 * 4 * 4 * (3 * 8)  # with their gradient and the cotangent of the output, of a chunk


@pytest.mark.parametrize(
    ("places", "on_host"),
    [
        (ON_DEVICE, 0),
        (ON_DEVICE | dict(inputs="host"), INPUTS),
        (ON_DEVICE | dict(inputs="host", device_input_bytes=INPUTS * 4 // 2), INPUTS // 2),
        (ON_DEVICE | dict(attention="host"), OUTPUTS),
        (KEYS_ON_DEVICE, INPUTS + OUTPUTS),
        # Three chunks of queries wait for the second outer step, two for the third; the last stays.
        (ON_HOST, INPUTS + OUTPUTS + KEYS + (3 + 2) * QUERIES),
    ],
    ids=str,
)
def test_what_rests_on_the_host_is_copied_there(places, on_host):
    strategy = FullyPipelined(chunk_tokens=4, **places)
    loss = make_loss(DENSE, "float32", remat="none", strategy=strategy)

    def total(params):
        return loss(params, make_batch(), None)[0]

    params = jax.tree.map(lambda x: x.astype("float32"), make_params(DENSE))
    program = jax.make_jaxpr(jax.grad(total))(params).jaxpr
    assert copied(program, jax.memory.Space.Host) == on_host
    # More where a chunk comes twice: inputs for keys made again, keys for each chunk of queries.
    assert copied(program, jax.memory.Space.Device) >= on_host


def fetched_after_a_step(jaxpr):
    """Copies to the device of what comes out of a barrier with something that is used next."""
    found = 0
    made = {x: equation for equation in jaxpr.eqns for x in equation.outvars}
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put":
            barriers = {made.get(x) for x in equation.invars}
            is_copy = set(equation.params["devices"]) == {jax.memory.Space.Device}
            ties = [e for e in barriers if e and e.primitive.name == "optimization_barrier"]
            others = [x for e in ties for x in e.outvars if x not in equation.invars]
            found += is_copy and any(id(x) in used for x in others)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += fetched_after_a_step(inner) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize(
    ("places", "num_fetched"),
    # Keys of the chunks before, and queries that wait. Made again, keys come twice, outputs too.
    [(ON_DEVICE, 0), (ON_HOST, 1 + 2 + 3 + 3 + 2), (ON_HOST | TWICE, 2 * (1 + 2 + 3) + 3 + 2 + 4)],
    ids=str,
)
def test_a_chunk_comes_from_the_host_only_once_the_step_before_is_done(places, num_fetched):
    """Else the compiler may fetch all at once, and all chunks were on the device."""
    strategy = FullyPipelined(chunk_tokens=4, **places)
    loss = make_loss(DENSE, "float32", remat="none", strategy=strategy)
    params = jax.tree.map(lambda x: x.astype("float32"), make_params(DENSE))
    program = jax.make_jaxpr(jax.grad(lambda p: loss(p, make_batch(), None)[0]))(params)
    assert fetched_after_a_step(program.jaxpr) == num_fetched


def stream_of(finish, chunks):
    """A layer of one head of 8, whose queries, keys and values are its input, in three chunks."""
    q = jax.ShapeDtypeStruct((1, 1, 1, 8), "bfloat16")
    context = AttentionContext(jnp.zeros((1, 1), jnp.int32))

    def project(params, x, known):
        return (x[..., None, :],) * 3

    return Stream(
        project=project,
        enter=lambda q, k, v: (q, k, v),
        leave=lambda o: o,
        finish=finish,
        attention=attention_over_intervals(q, context, implementation="reference"),
        chunks=Cuts(3),
        pieces=Cuts(1),
        places=Places(("device",) * 3, "device", chunks),
    )


LAST = np.arange(3, dtype=np.int32)[None]  # key that each of three tokens sees


@pytest.mark.parametrize("chunks", ["device", "host"])
def test_gradients_of_chunks_in_bfloat16_are_added_up_in_float32(chunks):
    """256 + 1 is 256 in bfloat16, whichever chunk comes first."""
    stream = stream_of(lambda params, x, o, known, logits: (params * x, None), chunks)
    tokens = Tokens(None, Intervals(0 * LAST, LAST + 1))
    x = jnp.zeros((1, 3, 8), "bfloat16").at[0, :, 0].set(jnp.array([1, 256, 1]))

    def total(weight):
        return stream_layer(stream, weight, x, tokens)[0].astype("float32").sum()

    assert jax.jit(jax.grad(total))(jnp.ones((), "bfloat16")) == 258


@pytest.mark.parametrize("chunks", ["device", "host"])
def test_log_sum_exps_in_bfloat16_are_kept_in_float32(chunks):
    """Near 91.5 bfloat16 has steps of a half, and a probability would be off by a fifth."""
    stream = stream_of(lambda params, x, o, known, logits: (o[:, :, 0], None), chunks)
    tokens = Tokens(None, Intervals(0 * LAST, LAST + 1))
    x = jnp.asarray(np.arange(24).reshape(1, 3, 8) % 5 / 8, "bfloat16").at[..., 0].set(16)

    def in_chunks(x):
        return (stream_layer(stream, (), x, tokens)[0].astype("float32") ** 2).sum()

    def whole(x):
        logits = jnp.where(np.tri(3), x @ x.T / np.sqrt(8), -jnp.inf)
        return ((jax.nn.softmax(logits) @ x) ** 2).sum()

    wanted = jax.grad(whole)(x[0].astype("float32"))
    found = jax.jit(jax.grad(in_chunks))(x)[0]
    np.testing.assert_allclose(found.astype("float32"), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("places", "num_calls"),
    [(ON_HOST, 4 + 3 + 2 + 1), (KEYS_ON_DEVICE, 4), (ON_DEVICE, 4)],
    ids=["pairs of chunks", "keys on the device", "all on the device"],
)
def test_queries_meet_all_keys_that_lie_on_the_device_in_one_call(monkeypatch, places, num_calls):
    calls, backward = [], IntervalAttention.backward

    def counted(self, q, k, *rest):
        calls.append((q.shape[1], k.shape[1]))
        return backward(self, q, k, *rest)

    monkeypatch.setattr(IntervalAttention, "backward", counted)
    model = dense(num_layers=1)
    strategy = FullyPipelined(chunk_tokens=4, **places)
    loss = make_loss(model, "float32", remat="none", strategy=strategy)

    def sum_loss(params):
        return loss(params, make_batch(), None)[0]

    params = jax.tree.map(lambda x: x.astype("float32"), make_params(model))
    jax.eval_shape(jax.grad(sum_loss), params)
    assert calls == [(4, 4 if places is ON_HOST else 16)] * num_calls


@pytest.mark.parametrize(
    "places", [KEYS_ON_DEVICE, pytest.param(ON_HOST, marks=pytest.mark.long)], ids=str
)
def test_what_is_frozen_gets_no_gradient_and_none_is_computed(places):
    """Barriers tie all weights' gradients to the steps' order; those that nobody asks for go."""
    strategy = FullyPipelined(chunk_tokens=T // 2, num_pieces=1, **places)
    trainable = r".*attention/(q|o)"
    num_matmuls = []
    with jax.enable_x64(True):
        for names in (".*", trainable):
            settings = dict(trainable=names, strategy=strategy, remat="none")
            region, run = gradient_on_mesh(DENSE, MeshConfig(), **settings)
            arguments = make_params(DENSE), make_batch(length=T), KEY
            program = run.lower(*arguments).compile()
            num_matmuls.append(program.as_text().count(" dot("))
        gradients = canonical(region.specs, program(*arguments)[1])
        found = {path: leaf for path, leaf in tree.flatten(gradients).items() if leaf is not None}
        _, wanted = single_device(DENSE, length=T)
    assert set(found) == {"layers/0/attention/q", "layers/0/attention/o"}
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, tree.flatten(wanted)[path], rtol=1e-9, atol=1e-12)
    # Of each chunk the three weights of the feed-forward, and those of the head.
    assert num_matmuls[0] - num_matmuls[1] == 3 * 2 + 1


@pytest.mark.parametrize(("places", "num_calls"), [(ON_HOST, 4 + 3 + 2 + 1), (KEYS_ON_DEVICE, 4)])
def test_attention_whose_outputs_are_kept_is_not_run_again(monkeypatch, places, num_calls):
    calls, forward = {}, IntervalAttention.forward
    params = jax.tree.map(lambda x: x.astype("float32"), make_params(DENSE))
    for attention in ("host", "nowhere"):
        calls[attention] = []

        def counted(self, q, *rest, of=calls[attention]):
            of.append(q.shape)
            return forward(self, q, *rest)

        monkeypatch.setattr(IntervalAttention, "forward", counted)
        strategy = FullyPipelined(chunk_tokens=4, attention=attention, **places)
        loss = make_loss(DENSE, "float32", remat="none", strategy=strategy)
        jax.eval_shape(jax.grad(lambda p, f=loss: f(p, make_batch(), None)[0]), params)
    assert len(calls["nowhere"]) - len(calls["host"]) == num_calls


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_queries_that_wait_on_the_host_come_back(dtype):
    shape, (q, do, dq) = (2, 8, 4, 16), jax.random.split(jax.random.key(0), 3)
    queries = _Queries(
        jax.random.normal(q, shape, dtype),
        jax.random.normal(do, shape, dtype),
        jax.random.normal(dq, shape),
    )
    back = _Queries.unpacked(queries.packed(), head_dim=16)
    assert [x.dtype for x in back] == [x.dtype for x in queries]
    np.testing.assert_array_equal(back.q, queries.q)
    np.testing.assert_array_equal(back.do, queries.do)
    np.testing.assert_allclose(back.dq, queries.dq, rtol=2**-17 if dtype == "bfloat16" else 0)


RUN = Run(
    directory="unused",
    model=dense(max_length=4096),
    mesh=MeshConfig(sequence=2),
    data=DataConfig(sources=(TextSource(("unread",)),), sequence_length=4096, batch_size=2),
    optimizer=OptimizerConfig(),
    train=TrainConfig(steps=1),
    checkpoint=CheckpointConfig("unused", save_every=1, keep_last=1),
    execution=ExecutionConfig(remat="none", strategy=FullyPipelined(chunk_tokens=1024)),
)


def test_a_run_in_chunks_fits():
    check_fit(RUN)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (
            "strategy",
            dict(chunk_tokens=1000),
            r"sequence_length % chunk_tokens == 0, here 4096 % 1000 = 96; nearest: 512 or 1024",
        ),
        (
            "strategy",
            dict(chunk_tokens=2),
            r"here 2 % \(2 \* 1 \* 2\) = 2; nearest: 4",
        ),
        (
            "strategy",
            dict(num_pieces=3),
            r"1024 % \(2 \* 1 \* 3\) = 4; nearest: none with these num_pieces, but with 2 or 4",
        ),
        ("execution", dict(remat="full"), "ExecutionConfig.remat: given 'full', expected \"none\""),
        (
            "mesh",
            dict(pipeline=2),
            'inputs and chunks = "device" and attention "device" or "nowhere"',
        ),
        ("mesh", dict(ring=2), "MeshConfig.ring: given 2, expected 1 with FullyPipelined"),
        ("mesh", dict(tensor=2), "== 1 with FullyPipelined and MeshConfig.tensor > 1, here 2"),
        (
            "execution",
            dict(attention="invariant"),
            "ExecutionConfig.attention: given 'invariant', expected one of 'reference', 'mosaic'",
        ),
        ("model", dict(is_causal=False), r"Whole\(\) where attention is not causal"),
    ],
    ids=[
        "length",
        "shares",
        "pieces",
        "remat",
        "pipeline",
        "ring",
        "tensor",
        "invariant",
        "bidirectional",
    ],
)
def test_what_does_not_go_with_chunks_is_refused_with_the_equation(part, fields, message):
    if part == "strategy":
        strategy = dataclasses.replace(RUN.execution.strategy, **fields)
        part, fields = "execution", dict(strategy=strategy)
    changed = dataclasses.replace(getattr(RUN, part), **fields)
    with pytest.raises(InputError, match=message):
        check_fit(dataclasses.replace(RUN, **{part: changed}))


@pytest.mark.parametrize(
    ("strategy", "layout", "expected"),
    [
        (FullyPipelined(1024), None, r"Chunked\(chunk_tokens=1024\)"),
        (FullyPipelined(1024), Chunked(512), r"Chunked\(chunk_tokens=1024\)"),
        (Whole(), Chunked(1024), "no chunks"),
    ],
    ids=str,
)
def test_tokens_that_lie_elsewhere_than_the_strategy_thinks_are_refused(strategy, layout, expected):
    loss = make_loss(RUN.model, "float32", remat="none", strategy=strategy)
    with pytest.raises(InputError, match=f"token_layout: given .*, expected {expected}"):
        make_setup(
            table=RUN.table(),
            loss_fn=loss,
            mesh=RUN.mesh,
            optimizer=RUN.optimizer,
            train=RUN.train,
            token_layout=layout,
            devices=jax.devices()[:2],
        )


@pytest.mark.parametrize(
    "fields",
    [dict(chunk_tokens=0), dict(inputs="disk"), dict(attention="never"), dict(chunks="nowhere")],
    ids=str,
)
def test_a_wrong_field_is_named(fields):
    (name,) = fields
    with pytest.raises(InputError, match=f"FullyPipelined.{name}"):
        FullyPipelined(**fields)
