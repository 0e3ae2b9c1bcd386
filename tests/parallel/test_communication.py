"""What each scheme sends: the collectives of the train step compiled for described H200s equal the papers' formulas.

The comparison is complete: every all-gather, reduce-scatter, all-to-all and permute of the step, by
its size and how often it runs, and all bytes that are all-reduced; where the compiler packs several
together, as ZeRO's and a ring's, the bytes of each kind. What a formula does not have would show,
such as an all-gather that the compiler put in. A ring in a pipeline, which gathers, and the ragged
exchange are in test_ring and test_expert. Sizes are what a device is
given: of an all-gather the whole, of a reduce-scatter its share.
"""

import collections
import dataclasses
import functools
import math
import re

import jax
import optax
import pytest

from jaxscale import tree
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.launch.ahead_of_time import described_devices, has_plugin
from jaxscale.launch.collectives import collectives
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import parameter_table
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.attention import attention
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch
from jaxscale.parallel.mesh import TENSOR, MeshConfig, make_mesh
from jaxscale.parallel.pipeline.schedule import make_schedule
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import all_axes_of, make_specs
from jaxscale.parallel.sequence.ring import ring_attention
from jaxscale.train.losses import NextTokenLoss
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.plan import TrainConfig, make_plan
from jaxscale.train.state import abstract_state
from jaxscale.train.step import make_step

pytestmark = pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")

B, T, D, H, F, V = 4, 128, 64, 16, 192, 320
COMPUTE, FLOAT = (
    2,
    4,
)  # bytes: of activations, bfloat16; of parameters, gradients and the loss, float32
GATHER, SCATTER, EXCHANGE, PERMUTE = (
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Loss, weight and metrics; each parameter's part of two norms. Fewer bytes than the smallest
# gradient, a norm's [D].
MOST_FIGURES = 48


def model(num_heads=8, num_kv_heads=8, *, num_layers=1, **fields):
    """Without rotary positions and gates, which send nothing and take long to compile."""
    sizes = dict(
        num_layers=num_layers, vocab_size=V, model_dim=D, head_dim=H, ffn_dim=F, max_length=T
    )
    return ModelConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        positions="none",
        activation="gelu",
        **sizes,
        **fields,
    )


def compiled(model, mesh, **settings):
    """The collectives of one step: ({kind: {bytes: runs}} without all-reduces, bytes that are all-reduced)."""
    return in_total(program(model, mesh, **settings))


def program(
    model,
    mesh,
    *,
    num_microbatches=1,
    num_loss_chunks=1,
    remat="none",
    is_scanned=True,
    momentum=None,
):
    """One step's, compiled for H200s; without momentum the optimizer has no state, and nothing to shard."""
    devices = described_devices("h200", num_hosts=1, gpus_per_host=math.prod(mesh.sizes))
    specs = make_specs(parameter_table(model), mesh)
    run_attention = functools.partial(attention, implementation="reference")
    if mesh.ring > 1:
        num_ulysses, uses_permute = mesh.sequence // mesh.ring, mesh.pipeline == 1
        run_attention = ring_attention(
            ring=mesh.ring,
            num_ulysses=num_ulysses,
            uses_permute=uses_permute,
            implementation="reference",
        )
    schedule = None
    if mesh.pipeline > 1:
        schedule = make_schedule(mesh.schedule, mesh.pipeline, mesh.num_chunks, num_microbatches)
    region = Region(
        make_mesh(mesh, devices),
        specs,
        make_operations(mesh, specs, attention=run_attention, reduction="float32"),
        num_microbatches=num_microbatches,
        schedule=schedule,
        ring=mesh.ring,
    )
    stack = StackConfig(is_scanned=is_scanned, num_loss_chunks=num_loss_chunks, remat=remat)
    loss = NextTokenLoss(model, Policy(), stack)
    optimizer = optax.sgd(1e-3, momentum)
    state = abstract_state(
        model, optimizer, mesh=region.mesh, specs=specs, dtype="float32", trainable=".*"
    )
    batch = abstract_batch(region.mesh, B, T, is_packed=False)
    return make_step(loss, optimizer, region, state).lower(state, batch).compile().as_text()


def in_total(hlo):
    found, reduced = collections.defaultdict(collections.Counter), 0
    for each in collectives(hlo):
        assert each.is_exact
        if each.kind == "all-reduce":  # the compiler packs them together as it likes
            reduced += each.times * each.num_bytes
        else:
            found[each.kind][each.num_bytes] += each.times
    return dict(found), reduced


def gradient_bytes(model, mesh):
    """Of the gradients that a device has to sum with others: those of which other devices have the same share."""
    specs, total = make_specs(parameter_table(model), mesh), 0
    entries, shares = tree.flatten(parameter_table(model)), tree.flatten(specs.gradients)
    for path, entry in entries.items():
        ways = {axis: getattr(mesh, axis) for axis in all_axes_of(shares[path])}
        if math.prod(ways.values()) < math.prod(mesh.sizes):
            total += FLOAT * math.prod(entry.shape) // math.prod(ways.values())
    return total


def check_reduced(got, expected):
    assert expected <= got <= expected + MOST_FIGURES * FLOAT


def times(number, counted):
    return {
        kind: {size: number * runs for size, runs in sizes.items()}
        for kind, sizes in counted.items()
    }


def in_bytes(counted):
    return {
        kind: sum(size * runs for size, runs in sizes.items()) for kind, sizes in counted.items()
    }


def together(*counted):
    found = collections.defaultdict(collections.Counter)
    for kind, sizes in (item for each in counted for item in each.items()):
        found[kind].update(sizes)
    return dict(found)


# Sequence: Ulysses


def ulysses(mesh, num_heads, num_kv_heads, num_layers, *, rows=B):
    """The layers' exchanges of q, k, v and o, forward and of their gradients.

    Source: Jacobs et al. 2023 (arXiv 2309.14509), section 3.2: 4 N h / P elements a layer forward,
    N tokens of width h. Fewer key-value heads are fewer bytes, until there are fewer than members:
    each member needs at least one, so those are sent several times.
    """
    spread = math.lcm(num_kv_heads, mesh.sequence)
    if num_heads % mesh.sequence or num_heads % spread:
        spread, num_heads = 2 * [math.ceil(num_heads / mesh.sequence) * mesh.sequence]
    head = rows * T // mesh.sequence * H * COMPUTE
    one_way = num_layers * [num_heads * head, spread * head, spread * head, num_heads * head]
    return {EXCHANGE: collections.Counter(one_way + one_way)}


HEADS = [
    (8, 8, 2),
    (8, 2, 1),  # a key-value head for every two members
    pytest.param(8, 4, 1, marks=pytest.mark.long),
    pytest.param(8, 1, 1, marks=pytest.mark.long),
    pytest.param(6, 2, 1, marks=pytest.mark.long),  # filled up to 8 heads, keys as many
]


@pytest.mark.parametrize("num_heads, num_kv_heads, num_layers", HEADS)
def test_ulysses_exchanges_four_times_its_share_of_the_activations(
    num_heads, num_kv_heads, num_layers
):
    mesh, config = (
        MeshConfig(sequence=4, zero=0),
        model(num_heads, num_kv_heads, num_layers=num_layers),
    )
    found, reduced = compiled(config, mesh)
    positions = {GATHER: {B * T * FLOAT: 1}}  # of the mask: int32, and not once a layer
    assert found == together(ulysses(mesh, num_heads, num_kv_heads, num_layers), positions)
    check_reduced(reduced, gradient_bytes(config, mesh))
    if num_heads == num_kv_heads:
        assert (
            in_bytes(found)[EXCHANGE]
            == 2 * num_layers * 4 * (T * num_heads * H // mesh.sequence) * B * COMPUTE
        )


# Sequence: rings


def ring(mesh, num_kv_heads, num_layers):
    """Blocks of keys and values, forward and again backward, with their gradients in float32.

    Source: Liu et al. 2023 (arXiv 2310.01889), section 3: what R members have passes by every other
        in R - 1 rounds.
    """
    block = B * T // mesh.ring * num_kv_heads // (mesh.sequence // mesh.ring) * H
    return {PERMUTE: {num_layers * (mesh.ring - 1) * 2 * block * (COMPUTE + COMPUTE + FLOAT): 1}}


@pytest.mark.long
@pytest.mark.parametrize("size", [4, 2])
def test_a_ring_passes_keys_and_values_twice_and_their_gradients_once(size):
    """Alone and with Ulysses in each ring of two, which has half of the heads. Bytes, as a round is sent together."""
    mesh, config, num_layers = (
        MeshConfig(sequence=4, ring=size, zero=0),
        model(8, 4, num_layers=2),
        2,
    )
    found, reduced = compiled(config, mesh)
    sent = [
        ring(mesh, 4, num_layers),
        {GATHER: {4 * B * T * FLOAT: 1}},
    ]  # tokens, labels, weights, positions: laid out
    if size < mesh.sequence:
        sent += [ulysses(mesh, 8, 4, num_layers), {GATHER: {B * T // size * FLOAT: 1}}]
    assert in_bytes(found) == in_bytes(together(*sent))
    check_reduced(reduced, gradient_bytes(config, mesh))


# Tensor


def tensor(mesh, *, rows=B, length=T, num_layers=1, num_split=2, again=0, chunks=1):
    """What layers send whose norms have a share of the tokens, the embedding and the loss.

    Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2: two all-reduces a layer
    forward and two backward, each as an all-gather and a reduce-scatter; where rows are split,
    instead of either each member's share to each other member. Shoeybi et al. 2019 (arXiv
    1909.08053), section 3: of the vocabulary's shares only figures a token.

    Args:
        num_split: how many of a layer's two halves have their rows split.
        again: exchanges of shares a layer that rematerialisation repeats.
    """
    whole, part = rows * length * D * COMPUTE, rows * length * D * COMPUTE // mesh.tensor
    shares = num_layers * (4 * num_split + again) * (mesh.tensor - 1)
    gathered = num_layers * 2 * (2 - num_split)
    layers = {PERMUTE: {part: shares}, GATHER: {whole: gathered}, SCATTER: {part: gathered}}
    head = {GATHER: {whole: 1}, SCATTER: {part: 1}}
    # Rows are looked up in the parameters' type; their gradient comes back in that of the
    # activations.
    embedding = {SCATTER: {part * FLOAT // COMPUTE: 1}, GATHER: {whole: 1}}
    figures = 2 * rows * length * FLOAT // chunks  # the sum of exponentials and the label's logit
    loss = {SCATTER: {figures // mesh.tensor: chunks}, GATHER: {figures: chunks}}
    return {
        kind: +sizes for kind, sizes in together(layers, head, embedding, loss).items() if +sizes
    }


def test_tensor_parallelism_sends_two_all_reduces_worth_a_layer_each_way():
    mesh, config = MeshConfig(tensor=4, zero=0), model(num_layers=2)
    found, reduced = compiled(config, mesh, num_loss_chunks=2)
    # In bytes, as permutes between the same pairs may be sent together.
    assert in_bytes(found) == in_bytes(tensor(mesh, num_layers=2, chunks=2))
    maxima = B * T * FLOAT  # which steady the loss's exponentials
    check_reduced(reduced, gradient_bytes(config, mesh) + maxima)


@pytest.mark.parametrize(
    "num_members, most_alone", [(2, 0), pytest.param(4, 6, marks=pytest.mark.long)]
)
def test_tensor_parallelism_sends_beside_matmuls(num_members, most_alone):
    """In an unrolled stack from an exchange's start to its end there is a matmul, forward and backward."""
    mesh, config = MeshConfig(tensor=num_members, zero=0), model(num_layers=2)
    lines = program(config, mesh, is_scanned=False).partition("\nENTRY")[2].splitlines()
    names = [line.split(" = ")[0].strip() for line in lines]
    alone = sum(" collective-permute(" in line for line in lines)
    sent = [(i, re.search(r"permute-done\((%[\w.-]+)\)", line)) for i, line in enumerate(lines)]
    between = [lines[names.index(found[1]) : i] for i, found in sent if found]
    alone += sum(
        not any(re.search(r"calls=%\S*gemm|__cublas", line) for line in each) for each in between
    )
    assert len(between) > 10
    assert alone <= most_alone


@pytest.mark.long
@pytest.mark.parametrize(("remat", "again"), [("full", 3), ("dots", 2)])
def test_rematerialisation_repeats_collectives_too(remat, again):
    """Those into a layer's halves; those out of them unless their sum is kept, as the next layer's input always is.

    Bytes alone, as the compiler may send what is repeated together with what is not.
    """
    mesh = MeshConfig(tensor=4, zero=0)
    found, _ = compiled(model(num_layers=2), mesh, remat=remat)
    assert in_bytes(found) == in_bytes(tensor(mesh, num_layers=2, again=again))


@pytest.mark.long
@pytest.mark.parametrize(("remat", "times"), [("full", 3), ("dots", 2)])
def test_rematerialisation_repeats_ulysses_exchanges_unless_they_are_kept(remat, times):
    """Forward, again and backward; full remat asks for the last one, of the output, too: its matmul's input."""
    mesh = MeshConfig(sequence=4, zero=0)
    found, _ = compiled(
        model(num_layers=2), mesh, remat=remat
    )  # of one alone nothing would be made again
    assert 2 * in_bytes(found)[EXCHANGE] == times * in_bytes(ulysses(mesh, 8, 8, 2))[EXCHANGE]


# Data


def test_zero_0_reduces_the_gradients_once_a_step():
    """However many micro-batches. Source: Rajbhandari et al. 2019 (arXiv 1910.02054), section 7.1."""
    mesh, config = MeshConfig(data=2, zero=0), model()
    found, reduced = compiled(config, mesh, num_microbatches=2)
    assert found == {}
    assert gradient_bytes(config, mesh) == FLOAT * sum(
        math.prod(entry.shape) for entry in jax.tree.leaves(parameter_table(config))
    )
    check_reduced(reduced, gradient_bytes(config, mesh))


def zero(config, mesh, *, num_microbatches=1, remat="none"):
    """Gradients to the devices that update them, parameters to those that use them; Psi is all parameters.

    Source: Rajbhandari et al. 2019 (arXiv 1910.02054), section 7.1: Psi is scattered and Psi
        gathered, once a step;
    section 7.2: under ZeRO 3 in each micro-batch, and what is not kept for the backward is gathered
    again, to 3 Psi. That is the layers; embedding, head and final norm are gathered once and kept.
    """
    num_shards, sizes = mesh.data * mesh.sequence, {}  # of Psi what one of the `tensor` shares has
    specs = tree.flatten(make_specs(parameter_table(config), mesh).parameters)
    for path, entry in tree.flatten(parameter_table(config)).items():
        sizes[path] = math.prod(entry.shape) // (
            mesh.tensor if TENSOR in all_axes_of(specs[path]) else 1
        )
    scattered = FLOAT * sum(sizes.values()) // num_shards
    if mesh.zero < 3:
        return {GATHER: {FLOAT * sum(sizes.values()): 1}, SCATTER: {scattered: 1}}
    gathered = 0
    for (
        path,
        size,
    ) in (
        sizes.items()
    ):  # as they are used: rows are looked up and norms scaled in the parameters' type
        num_bytes = FLOAT if path == "embedding/tokens" or path.endswith("scale") else COMPUTE
        gathered += num_bytes * size * (2 if path.startswith("layers") and remat == "full" else 1)
    return times(num_microbatches, {GATHER: {gathered: 1}, SCATTER: {scattered: 1}})


ZERO = [
    (1, dict(data=2), dict(), 1),
    (
        3,
        dict(data=2),
        dict(remat="full"),
        2,
    ),  # layers: of one alone nothing would be gathered again
    pytest.param(2, dict(data=4), dict(), 1, marks=pytest.mark.long),
    pytest.param(1, dict(data=2, sequence=2), dict(), 1, marks=pytest.mark.long),
    pytest.param(2, dict(data=2, sequence=2), dict(num_microbatches=2), 1, marks=pytest.mark.long),
    pytest.param(3, dict(data=2, sequence=2), dict(num_microbatches=2), 1, marks=pytest.mark.long),
]


@pytest.mark.parametrize("level, sizes, settings, num_layers", ZERO, ids=str)
def test_zero_scatters_gradients_and_gathers_parameters(level, sizes, settings, num_layers):
    """Bytes, for the compiler sends many parameters together. It scatters under ZeRO 1 too, as a share is all it reads.

    Nothing is all-reduced but figures, and the `sequence` axis sends what it sends without ZeRO.
    """
    mesh, config = MeshConfig(zero=level, **sizes), model(num_layers=num_layers)
    found, reduced = compiled(config, mesh, momentum=0.9, **settings)
    rows, others = B // mesh.data, []
    if mesh.sequence > 1:
        others = [ulysses(mesh, 8, 8, num_layers, rows=rows), {GATHER: {rows * T * FLOAT: 1}}]
    assert in_bytes(found) == in_bytes(together(zero(config, mesh, **settings), *others))
    assert (
        num_layers * max(found[SCATTER]) <= in_bytes(found)[SCATTER]
    )  # a layer's gradient waits for no other's
    check_reduced(reduced, 0)


# Experts

E, A = 8, 3


def mixture(**fields):
    return model(moe_pattern=(True,), num_experts=E, num_active_experts=A, expert_dim=F, **fields)


def test_experts_exchange_their_worst_case_forth_and_back():
    """2 R D elements a layer forward and backward, R = expert n min(A, E / expert) rows for n local tokens.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 3.2, whose capacity is the worst case
        here.
    """
    mesh, config = MeshConfig(expert=4, zero=0), mixture()
    found, reduced = compiled(config, mesh)
    rows = mesh.expert * (B // mesh.expert * T) * min(A, E // mesh.expert)
    counts = E * FLOAT  # int32: how many of the rows there are
    assert found == {EXCHANGE: {rows * D * COMPUTE: 2 * 2, counts: 1}}
    loads = 2 * E * FLOAT  # the balance loss's, and the metrics
    check_reduced(reduced, gradient_bytes(config, mesh) + loads)


# Pipeline


def permutes(mesh, num_ticks, *, num_microbatches, share=1):
    """An activation [b, T, D] to the next stage and a gradient to the previous one at the end of each tick.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 3.2. Idle stages send too, what nobody
        reads.
    """
    return {PERMUTE: {B // num_microbatches * T * D * COMPUTE // share: 2 * num_ticks}}


def outside(mesh):
    """What is in no layer: each stage stores a share, all have it during the step and reduce its gradient."""
    size = FLOAT * (2 * V // mesh.tensor + 1) * D  # embedding, head, the final norm's scale
    return {GATHER: {size: 1}, SCATTER: {size // mesh.pipeline: 1}}


S, M = 2, 4
SCHEDULES = [  # with stages, chunks and ticks
    ("1f1b", S, 1, M + 2 * (S - 1)),
    pytest.param("gpipe", S, 1, 2 * M - 1 + 2 * (S - 1), marks=pytest.mark.long),
    # In a ring of two both permutes have the same pairs and are sent as one.
    pytest.param(
        "interleaved", 4, 2, make_schedule("interleaved", 4, 2, M).num_ticks, marks=pytest.mark.long
    ),
    pytest.param(
        "zero_bubble", S, 1, make_schedule("zero_bubble", S, 1, M).num_ticks, marks=pytest.mark.long
    ),
]


@pytest.mark.parametrize("schedule, num_stages, num_chunks, num_ticks", SCHEDULES)
def test_a_pipeline_sends_two_activations_a_tick(schedule, num_stages, num_chunks, num_ticks):
    mesh = MeshConfig(pipeline=num_stages, zero=0, schedule=schedule, num_chunks=num_chunks)
    found, reduced = compiled(model(num_layers=num_stages * num_chunks), mesh, num_microbatches=M)
    assert found == together(permutes(mesh, num_ticks, num_microbatches=M), outside(mesh))
    check_reduced(reduced, 0)


# Several at once


def run_program(model, mesh):
    """The step as a run has it: AdamW, clipped, of the plan, instead of `program`'s bare parts."""
    devices = described_devices("h200", num_hosts=1, gpus_per_host=math.prod(mesh.sizes))
    data = DataConfig(
        sources=(TextSource(("unread",)),), sequence_length=T, batch_size=B, is_packed=False
    )
    stack = StackConfig(num_loss_chunks=1, remat="none", attention="reference")
    plan = make_plan(
        model=model,
        mesh=mesh,
        data=data,
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(steps=2),
        policy=Policy(),
        stack=stack,
        devices=devices,
    )
    step = make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state)
    return (
        step.lower(plan.state, abstract_batch(plan.mesh, B, T, is_packed=False)).compile().as_text()
    )


@pytest.mark.long
@pytest.mark.parametrize("is_run", [False, True], ids=["parts", "run"])
def test_axes_send_nothing_more_together(is_run):
    """ZeRO over data and sequence, Ulysses and tensor: each sends what it does alone, of the others' share."""
    mesh, config = MeshConfig(data=2, sequence=2, tensor=2, zero=2), model(8, 4)
    if is_run:
        config = dataclasses.replace(config, positions="rope", activation="swiglu")
        found, reduced = in_total(run_program(config, mesh))
    else:
        found, reduced = compiled(config, mesh, momentum=0.9)
    rows, length = B // mesh.data, T // mesh.sequence
    positions = {GATHER: {rows * T * FLOAT: 1}}
    heads = times(
        mesh.tensor, ulysses(mesh, 8 // mesh.tensor, 4 // mesh.tensor, 1, rows=rows // mesh.tensor)
    )
    sent = together(heads, tensor(mesh, rows=rows, length=length), zero(config, mesh), positions)
    assert in_bytes(found) == in_bytes(sent)
    maxima = rows * length * FLOAT
    check_reduced(reduced, gradient_bytes(config, mesh) + maxima)


@pytest.mark.long
def test_tensor_experts_exchange_no_tokens():
    mesh = MeshConfig(tensor=4, zero=0, expert_axis="tensor")
    assert in_bytes(compiled(mixture(), mesh)[0]) == in_bytes(tensor(mesh, num_split=1))


@pytest.mark.long
def test_a_pipeline_of_tensor_groups_adds_up():
    """F and B count as taken in each tick, whatever the slot, so each has the layers of a stage and both ends."""
    mesh, config = MeshConfig(pipeline=S, tensor=2, zero=0), model(num_layers=S)
    found, _ = compiled(config, mesh, num_microbatches=M)
    num_ticks = M + 2 * (S - 1)
    each = tensor(mesh, rows=B // M, num_layers=1, num_split=0)
    sent = permutes(mesh, num_ticks, num_microbatches=M, share=mesh.tensor)
    assert found == together(times(num_ticks, each), sent, outside(mesh))
