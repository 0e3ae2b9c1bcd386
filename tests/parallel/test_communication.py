"""What each scheme sends: the collectives of the compiled step equal the papers' formulas.

The comparison is complete: every all-gather, reduce-scatter, all-to-all and permute of the step, by
its size and how often it runs, and all bytes that are all-reduced. Where the compiler packs several
together, as ZeRO's and a ring's, the bytes of each kind. What a formula does not have would show,
such as an all-gather that the compiler put in. `test_ring` has a ring in a pipeline, which gathers.

By default one program has Ulysses, tensor parallelism and ZeRO together; each alone is long.
"""

import re

import pytest

from jaxscale.launch.ahead_of_time import has_plugin
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.pipeline.schedule import make_schedule
from tests.parallel import traffic
from tests.parallel.traffic import (
    COMPUTE,
    EXCHANGE,
    FLOAT,
    GATHER,
    SCATTER,
    B,
    D,
    F,
    H,
    T,
    check_reduced,
    gradient_bytes,
    in_bytes,
    model,
    outside_layers,
    permutes,
    ring,
    run_program,
    sent,
    shared_head,
    tensor,
    times,
    together,
    ulysses,
    zero,
)

pytestmark = pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
MATMUL = re.compile(r"calls=%\S*gemm|__cublas")


# Several at once


@pytest.mark.parametrize(
    ("level", "is_run"),
    [
        pytest.param(3, False, marks=pytest.mark.long),
        pytest.param(2, False, marks=pytest.mark.long),
        pytest.param(2, True, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_axes_send_nothing_more_together(level, is_run):
    """ZeRO over data and sequence, Ulysses, tensor: each sends what it does alone, of a share."""
    mesh = MeshConfig(data=2, sequence=2, tensor=2, zero=level)
    if is_run:
        config = model(8, 4, positions="rope", activation="swiglu")
        found, reduced = traffic.in_total(run_program(config, mesh))
    else:
        config = model(8, 4)
        found, reduced = sent(config, mesh, momentum=0.9)
    rows, length = B // mesh.data, T // mesh.sequence
    positions = {GATHER: {rows * T * FLOAT: 1}}
    # Each tensor member has a share of the heads, and exchanges those of one group of rows at once.
    one_group = ulysses(mesh, 8 // mesh.tensor, 4 // mesh.tensor, 1, rows=rows // mesh.tensor)
    expected = together(
        times(mesh.tensor, one_group),
        tensor(mesh, rows=rows, length=length),
        zero(config, mesh),
        positions,
    )
    assert in_bytes(found) == in_bytes(expected)
    maxima = rows * length * FLOAT  # which steady the loss's exponentials
    check_reduced(reduced, gradient_bytes(config, mesh) + maxima)


# Sequence

HEADS = [
    (8, 8, 2),
    (8, 2, 1),  # a key-value head for every two members
    (8, 4, 1),
    (8, 1, 1),
    (6, 2, 1),  # filled up to 8 heads, keys as many
]


@pytest.mark.long
@pytest.mark.parametrize("num_heads, num_kv_heads, num_layers", HEADS)
def test_ulysses_exchanges_four_times_its_share_of_the_activations(
    num_heads, num_kv_heads, num_layers
):
    mesh = MeshConfig(sequence=4, zero=0)
    config = model(num_heads, num_kv_heads, num_layers=num_layers)
    found, reduced = sent(config, mesh)
    positions = {GATHER: {B * T * FLOAT: 1}}  # of the mask: int32, and not once a layer
    assert found == together(ulysses(mesh, num_heads, num_kv_heads, num_layers), positions)
    check_reduced(reduced, gradient_bytes(config, mesh))
    if num_heads == num_kv_heads:
        share = T * num_heads * H // mesh.sequence
        assert in_bytes(found)[EXCHANGE] == 2 * num_layers * 4 * share * B * COMPUTE


@pytest.mark.long
@pytest.mark.parametrize("size", [4, 2])
def test_a_ring_passes_keys_and_values_twice_and_their_gradients_once(size):
    """Alone and with Ulysses in each ring of two, which has half of the heads.

    Bytes, as a round is sent together.
    """
    num_layers = 2
    mesh = MeshConfig(sequence=4, ring=size, zero=0)
    config = model(8, 4, num_layers=num_layers)
    found, reduced = sent(config, mesh)
    # Tokens, labels, weights and positions are laid out.
    laid_out = {GATHER: {4 * B * T * FLOAT: 1}}
    expected = [ring(mesh, 4, num_layers), laid_out]
    if size < mesh.sequence:
        positions = {GATHER: {B * T // size * FLOAT: 1}}
        expected += [ulysses(mesh, 8, 4, num_layers), positions]
    assert in_bytes(found) == in_bytes(together(*expected))
    check_reduced(reduced, gradient_bytes(config, mesh))


# Tensor


@pytest.mark.long
def test_tensor_parallelism_sends_two_all_reduces_worth_a_layer_each_way():
    mesh, config = MeshConfig(tensor=4, zero=0), model(num_layers=2)
    found, reduced = sent(config, mesh, num_loss_chunks=2)
    # In bytes, as permutes between the same pairs may be sent together.
    assert in_bytes(found) == in_bytes(tensor(mesh, num_layers=2, chunks=2))
    maxima = B * T * FLOAT  # which steady the loss's exponentials
    check_reduced(reduced, gradient_bytes(config, mesh) + maxima)


@pytest.mark.long
@pytest.mark.parametrize("num_members, most_alone", [(2, 0), (4, 6)])
def test_tensor_parallelism_sends_beside_matmuls(num_members, most_alone):
    """In an unrolled stack between an exchange's start and its end there is a matmul, both ways."""
    mesh, config = MeshConfig(tensor=num_members, zero=0), model(num_layers=2)
    hlo = traffic.program(config, mesh, is_scanned=False)
    lines = hlo.partition("\nENTRY")[2].splitlines()
    names = [line.split(" = ")[0].strip() for line in lines]
    num_alone = sum(" collective-permute(" in line for line in lines)
    num_started = 0
    for end, line in enumerate(lines):
        if done := re.search(r"permute-done\((%[\w.-]+)\)", line):
            start = names.index(done[1])
            num_started += 1
            num_alone += not any(MATMUL.search(each) for each in lines[start:end])
    assert num_started > 10
    assert num_alone <= most_alone


@pytest.mark.long
@pytest.mark.parametrize(("remat", "again"), [("full", 3), ("dots", 2)])
def test_rematerialisation_repeats_collectives_too(remat, again):
    """Those into a layer's halves, and those out of them unless their sum is kept.

    The next layer's input always is. Bytes alone, as the compiler may send what is repeated
    together with what is not.
    """
    mesh = MeshConfig(tensor=4, zero=0)
    found, _ = sent(model(num_layers=2), mesh, remat=remat)
    assert in_bytes(found) == in_bytes(tensor(mesh, num_layers=2, again=again))


@pytest.mark.long
@pytest.mark.parametrize(("remat", "num_times"), [("full", 3), ("dots", 2)])
def test_rematerialisation_repeats_ulysses_exchanges_unless_they_are_kept(remat, num_times):
    """Forward, again and backward.

    Full remat asks for the last one, of the output, too: its matmul's input.
    """
    mesh = MeshConfig(sequence=4, zero=0)
    # Of one layer alone nothing would be made again.
    found, _ = sent(model(num_layers=2), mesh, remat=remat)
    both_ways = in_bytes(ulysses(mesh, 8, 8, 2))[EXCHANGE]
    assert 2 * in_bytes(found)[EXCHANGE] == num_times * both_ways


# Data


@pytest.mark.long
def test_zero_0_reduces_the_gradients_once_a_step():
    """However many micro-batches.

    Source: Rajbhandari et al. 2019 (arXiv 1910.02054), section 7.1.
    """
    mesh, config = MeshConfig(data=2, zero=0), model()
    found, reduced = sent(config, mesh, num_microbatches=2)
    assert found == {}
    num_parameters = 2 * traffic.V * D + 4 * 8 * H * D + 2 * D * F + 3 * D
    assert gradient_bytes(config, mesh) == FLOAT * num_parameters
    check_reduced(reduced, gradient_bytes(config, mesh))


ZERO = [
    (1, dict(data=2), dict(num_microbatches=2), 1),
    # Two layers: of one alone nothing would be gathered again.
    (3, dict(data=2), dict(remat="full"), 2),
    (2, dict(data=4), dict(), 1),
    (1, dict(data=2, sequence=2), dict(), 1),
    (2, dict(data=2, sequence=2), dict(num_microbatches=2), 1),
    (3, dict(data=2, sequence=2), dict(num_microbatches=2), 1),
]


@pytest.mark.parametrize(
    "level, sizes, settings, num_layers",
    [ZERO[0], *(pytest.param(*case, marks=pytest.mark.long) for case in ZERO[1:])],
    ids=str,
)
def test_zero_scatters_gradients_and_gathers_parameters(level, sizes, settings, num_layers):
    """Bytes, for the compiler sends many parameters together.

    It scatters under ZeRO 1 too, as a share is all it reads. Once a step: only ZeRO 3 does so in
    each micro-batch. Nothing is all-reduced but figures,
    and the `sequence` axis sends what it sends without ZeRO.
    """
    mesh, config = MeshConfig(zero=level, **sizes), model(num_layers=num_layers)
    found, reduced = sent(config, mesh, momentum=0.9, **settings)
    rows, others = B // mesh.data, []
    if mesh.sequence > 1:
        others = [ulysses(mesh, 8, 8, num_layers, rows=rows), {GATHER: {rows * T * FLOAT: 1}}]
    assert in_bytes(found) == in_bytes(together(zero(config, mesh, **settings), *others))
    # A layer's gradient waits for no other's.
    assert num_layers * max(found[SCATTER]) <= in_bytes(found)[SCATTER]
    check_reduced(reduced, 0)


# Experts

E, A = 8, 3
MIXTURE = model(moe_pattern=(True,), num_experts=E, num_active_experts=A, expert_dim=F)


@pytest.mark.long
def test_experts_get_all_tokens_once_and_send_back_one_sum_each():
    """2 expert n D elements a layer forward and backward, for n local tokens.

    Not min(A, E / expert) times as many, which is the worst case of a row for each choice. With the
    tokens go their choices and gates, and the gates' gradients come back.
    """
    mesh = MeshConfig(expert=4, zero=0)
    found, reduced = sent(MIXTURE, mesh)
    tokens = B * T * D * COMPUTE
    choices = B * T * A * FLOAT
    gathered, exchanged = 2 * tokens + 2 * choices, 2 * tokens + choices
    assert in_bytes(found) == {GATHER: gathered, EXCHANGE: exchanged}
    loads = 2 * E * FLOAT  # the balance loss's, and the metrics
    check_reduced(reduced, gradient_bytes(MIXTURE, mesh) + loads)


@pytest.mark.long
def test_tensor_experts_exchange_no_tokens():
    mesh = MeshConfig(tensor=4, zero=0, expert_axis="tensor")
    found, _ = sent(MIXTURE, mesh)
    assert in_bytes(found) == in_bytes(tensor(mesh, num_split=1))


# Pipeline

S, M = 2, 4
SCHEDULES = [  # with stages, chunks and ticks
    ("1f1b", S, 1, M + 2 * (S - 1)),
    ("gpipe", S, 1, 2 * M - 1 + 2 * (S - 1)),
    # In a ring of two both permutes have the same pairs and are sent as one.
    ("interleaved", 4, 2, make_schedule("interleaved", 4, 2, M).num_ticks),
    ("zero_bubble", S, 1, make_schedule("zero_bubble", S, 1, M).num_ticks),
]


@pytest.mark.parametrize(
    "schedule, num_stages, num_chunks, num_ticks",
    [SCHEDULES[0], *(pytest.param(*case, marks=pytest.mark.long) for case in SCHEDULES[1:])],
)
def test_a_pipeline_sends_two_activations_a_tick(schedule, num_stages, num_chunks, num_ticks):
    mesh = MeshConfig(pipeline=num_stages, zero=0, schedule=schedule, num_chunks=num_chunks)
    is_scanned = schedule != "zero_bubble"
    config = model(num_layers=num_stages * num_chunks)
    found, reduced = sent(config, mesh, num_microbatches=M, is_scanned=is_scanned)
    assert found == together(permutes(num_ticks, num_microbatches=M), outside_layers(mesh))
    check_reduced(reduced, shared_head(num_ticks, num_microbatches=M))


@pytest.mark.long
def test_a_pipeline_of_tensor_groups_adds_up():
    """F and B count as taken in each tick, whatever the slot.

    So each tick has the layers of a stage and both ends.
    """
    mesh, config = MeshConfig(pipeline=S, tensor=2, zero=0), model(num_layers=S)
    found, _ = sent(config, mesh, num_microbatches=M)
    num_ticks = M + 2 * (S - 1)
    each = tensor(mesh, rows=B // M, num_layers=1, num_split=0)
    stages = permutes(num_ticks, num_microbatches=M, share=mesh.tensor)
    assert found == together(times(num_ticks, each), stages, outside_layers(mesh))
