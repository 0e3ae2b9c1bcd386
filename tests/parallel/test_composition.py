"""Every axis, pair and triple of them: loss and every gradient equal one device's, in float64.

The default tests take the fewest meshes that have every axis at least once, mostly two axes at a
time, because compiling is nearly all that a case costs. The long ones take every axis alone, every
pair, every triple and the variants, so that they tell which axis is at fault.

With JAXSCALE_MATRIX=FILE each case also runs in float32 and its errors are appended to FILE, of
which `experiments/composition_table.py` makes the table of the README.
"""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.checkpoint.manager import CheckpointConfig
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.models.execution import ByChunk, ExecutionConfig
from jaxscale.parallel.mesh import AXES, MeshConfig
from jaxscale.run.fit import check_fit
from jaxscale.run.run import Run
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.types import InputError
from tests.parallel import comparison
from tests.parallel.comparison import (
    NUM_ACTIVE,
    assert_equal_to_single_device,
    dense,
    make_params,
    mixture,
    on_mesh,
    relative_errors,
    single_device,
)

# What each token draws must not depend on the mesh; the threshold lets most experts be drawn.
DRAWS = dict(
    num_kv_heads=4,
    router="sparsemixer_v2",
    router_threshold=0.8,
    expert_dropout=0.3,
    use_head_bias=True,
)
MAKERS = {"dense": dense, "moe": mixture, "grin": mixture}
FIELDS = {
    "dense": dict(num_layers=3, num_kv_heads=4, is_tied=True),
    "moe": dict(num_kv_heads=4),
    "grin": DRAWS,
}
ROUTERS = ("sparsemixer", "sparsemixer_v2_star", "masked_sampling", "densemixer")
for router in ROUTERS:
    MAKERS[router] = mixture
    FIELDS[router] = DRAWS | dict(
        router=router,
        num_layers=2,
        num_active_experts=1 if router == "sparsemixer" else NUM_ACTIVE,
    )
PERIODS = {name: 1 if name == "dense" else 2 for name in MAKERS}
NUM_MICROBATCHES = 2
LIMIT = 1e-9  # of each error of `relative_errors`

SINGLES = [{axis: 2} for axis in AXES] + [{axis: 4} for axis in AXES[:-1]]
PAIRS = [{one: 2, other: 2} for one, other in itertools.combinations(AXES, 2)]
TRIPLES = [dict.fromkeys(three, 2) for three in itertools.combinations(AXES, 3)]
VARIANTS = [
    dict(pipeline=2, schedule="gpipe", num_microbatches=4),
    dict(pipeline=2, schedule="interleaved", num_chunks=2),
    dict(pipeline=2, schedule="interleaved", num_chunks=2, is_scanned=False, remat="none"),
    # Chunks of 2, 1, 1 and 1 periods.
    dict(pipeline=2, schedule="interleaved", num_chunks=2, num_periods=5),
    dict(pipeline=2, schedule="zero_bubble", is_scanned=False),
    dict(pipeline=2, tensor=2, schedule="zero_bubble", is_scanned=False, remat="none"),
    dict(sequence=2, data=2, zero_axes=("data",)),
    dict(sequence=2, data=2, zero=0),
    dict(sequence=2, data=2, zero=1),
    dict(sequence=2, data=2, zero=2),
    dict(sequence=2, ring=2, tensor=2),
    dict(tensor=2, data=2, expert_axis="tensor"),
    dict(tensor=2, expert=2, pipeline=2, expert_axis="tensor"),
    dict(sequence=4, ring=2, data=2),
    dict(pipeline=2, sequence=2, ring=2),
    dict(data=4, tensor=2, zero=2),
    dict(data=2, expert=2, tensor=2, is_scanned=False, remat="none"),
]

RING = dict(sequence=2, ring=2)
CASES = [
    pytest.param("dense", dict(pipeline=2, sequence=2), marks=pytest.mark.long),
    ("dense", RING),
    ("moe", dict(pipeline=2, schedule="zero_bubble", is_scanned=False)),
    ("grin", dict(data=2, expert=2)),
    ("grin", dict(sequence=2, tensor=2)),
    pytest.param("densemixer", dict(data=2, expert=2), marks=pytest.mark.long),
]


def make_model(name, sizes):
    """The model of a case, with more layers if the stages need them."""
    fields = dict(FIELDS[name])
    num_chunks = sizes.get("pipeline", 1) * sizes.get("num_chunks", 1)
    num_periods = sizes.get("num_periods", 2 * num_chunks if num_chunks > 2 else None)
    if num_periods:
        fields["num_layers"] = num_periods * PERIODS[name]
    return MAKERS[name](**fields)


def settings_of(sizes):
    """How a case runs: with remat, accumulation and ZeRO-3 unless it says otherwise."""
    settings = dict(zero=3, num_microbatches=NUM_MICROBATCHES) | sizes
    settings.pop("num_periods", None)
    return settings


def num_single_microbatches(name, settings):
    """Of the single device: shares of the experts are those of a micro-batch."""
    return 1 if name == "dense" else settings["num_microbatches"]


def all_errors(result, wanted):
    """Relative errors of the loss and of each parameter's gradient."""
    (loss, _, metrics), gradients = result
    wanted_loss, wanted_gradients = wanted
    if "load" in metrics:
        num_choices = np.asarray(metrics["load"]).sum(1)
        assert (num_choices == num_choices[0]).all()
        assert num_choices[0] > 0
    of_loss = abs(float(loss) / float(wanted_loss) - 1)
    return {"loss": of_loss} | relative_errors(gradients, wanted_gradients)


def assert_as_on_one_device(name, sizes):
    """Runs one case and compares it with one device."""
    model, settings = make_model(name, sizes), settings_of(sizes)
    with jax.enable_x64(True):
        wanted = single_device(model, num_single_microbatches(name, settings))
        found = all_errors(on_mesh(model, **settings), wanted)
    wrong = {path: error for path, error in found.items() if not error <= LIMIT}
    assert not wrong
    if file := os.environ.get("JAXSCALE_MATRIX"):
        with jax.enable_x64(True):
            rounded = all_errors(on_mesh(model, dtype="float32", **settings), wanted)
        record(file, name, sizes, max(found.values()), max(rounded.values()))


def record(file, name, sizes, float64, float32):
    """Appends a case to the file of which the README's table is made."""
    line = dict(model=name, sizes=sizes, float64=float64, float32=float32)
    with Path(file).open("a") as lines:
        lines.write(json.dumps(line, default=str) + "\n")


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_every_axis(name, sizes):
    assert_as_on_one_device(name, sizes)


EVERY_ROW, EVERY_TOKEN, SECOND_ROWS = range(8), range(16), range(4, 8)
SECOND_MICROBATCH = range(1, 8, 2)
EMPTY = [
    ("pipeline", "dense", dict(pipeline=2, sequence=2), (SECOND_MICROBATCH, EVERY_TOKEN)),
    ("ulysses", "dense", dict(pipeline=2, sequence=2), (EVERY_ROW, range(8, 16))),
    # The second member of a ring has the middle.
    ("ring", "dense", RING, (EVERY_ROW, range(4, 12))),
    ("data and expert", "grin", dict(data=2, expert=2), (SECOND_ROWS, EVERY_TOKEN)),
    # Norms and losses of a member of a tensor group have a share of the rows.
    ("tensor", "grin", dict(sequence=2, tensor=2), (SECOND_ROWS, EVERY_TOKEN)),
]


@pytest.mark.parametrize(
    ("name", "sizes", "empty"), [case[1:] for case in EMPTY], ids=[case[0] for case in EMPTY]
)
def test_a_member_or_micro_batch_all_of_whose_tokens_are_padding_counts_for_nothing(
    name, sizes, empty
):
    """Divided where the tokens are, its loss would be 0 / 0, or a mean of means.

    With the programs of `test_every_axis`.
    """
    model, settings = make_model(name, sizes), settings_of(sizes)
    with jax.enable_x64(True):
        wanted = single_device(model, num_single_microbatches(name, settings), empty)
        result = on_mesh(model, empty=empty, **settings)
        assert_equal_to_single_device(result, wanted, empty)


CHUNKED = [
    pytest.param("grin", dict(data=2, sequence=2), marks=pytest.mark.long),
    pytest.param("dense", dict(data=2), marks=pytest.mark.long),
    pytest.param("dense", dict(sequence=2), marks=pytest.mark.long),
    pytest.param("dense", RING, marks=pytest.mark.long),
    pytest.param("moe", dict(expert=2), marks=pytest.mark.long),
    pytest.param("moe", dict(pipeline=2), marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "sizes"), CHUNKED, ids=str)
def test_layers_by_chunks_equal_whole_ones_on_one_device(name, sizes):
    assert_as_on_one_device(name, sizes | dict(strategy=ByChunk(2)))


def run_of(mesh, **execution):
    """A run of a dense model of two layers."""
    return Run(
        directory="unused",
        model=dense(),
        mesh=mesh,
        data=DataConfig(sources=(TextSource(("unread",)),), sequence_length=16, batch_size=8),
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=1, num_microbatches=2),
        checkpoint=CheckpointConfig("unused", save_every=1, keep_last=1),
        execution=ExecutionConfig(num_loss_chunks=2, **execution),
    )


def test_layers_by_chunks_are_refused_in_a_tensor_group():
    """Its members have other tokens each, so that a chunk of one is none of another."""
    run = run_of(MeshConfig(tensor=2), strategy=ByChunk(2))
    with pytest.raises(InputError, match=r"ExecutionConfig.strategy: given ByChunk.*tensor > 1"):
        check_fit(run)
    check_fit(dataclasses.replace(run, mesh=MeshConfig(data=2, sequence=2)))


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        (
            dict(checkpoint_every=2, checkpoint_place="host"),
            r"checkpoint_place: given 'host', expected \"device\" with MeshConfig.pipeline > 1",
        ),
        (
            dict(remat="names", offloaded_names=("residual",)),
            r"offloaded_names: given \('residual',\), expected none with MeshConfig.pipeline > 1",
        ),
    ],
    ids=["checkpoint_place", "offloaded_names"],
)
def test_a_pipeline_refuses_what_would_rest_on_the_host(execution, message):
    with pytest.raises(InputError, match=message):
        check_fit(run_of(MeshConfig(pipeline=2), **execution))
    check_fit(run_of(MeshConfig(data=2), **execution))


@pytest.mark.parametrize(
    ("mesh", "num", "fitting"),
    [(dict(pipeline=2), 1, [1]), (dict(pipeline=2, stage_periods=(3, 1)), 3, [1, 3])],
    ids=str,
)
def test_groups_of_layers_that_do_not_divide_a_stages_are_refused_with_the_equation(
    mesh, num, fitting
):
    """They divide the model's layers; a stage runs as many as the longest one has."""
    run = run_of(MeshConfig(**mesh), checkpoint_every=2)
    run = dataclasses.replace(run, model=dense(num_layers=sum(mesh.get("stage_periods", (1, 1)))))
    message = (
        r"ExecutionConfig.checkpoint_every: given 2, expected periods of the longest of 2 stages "
        rf"% checkpoint_every == 0, but {num} % 2 = 1: {re.escape(str(fitting))}"
    )
    with pytest.raises(InputError, match=message):
        check_fit(run)
    check_fit(dataclasses.replace(run, mesh=MeshConfig(data=2)))


LONG = SINGLES + PAIRS + TRIPLES + VARIANTS


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "sizes"),
    [(n, s) for n in ("dense", "moe") for s in LONG if (n, s) not in CASES],
    ids=str,
)
def test_every_pair_and_triple(name, sizes):
    assert_as_on_one_device(name, sizes)


@pytest.mark.long
def test_what_tokens_draw_does_not_depend_on_the_mesh():
    """Where one device rematerialises and the mesh does not."""
    assert_as_on_one_device(
        "grin", dict(data=2, expert=2, tensor=2, num_microbatches=1, remat="none")
    )


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "densemixer"])
def test_every_router_chooses_and_learns_the_same_on_a_mesh(name):
    assert_as_on_one_device(name, dict(data=2, expert=2))


@pytest.mark.long
def test_no_token_is_dropped_when_all_choose_the_same_device(monkeypatch):
    """All logits are equal, so every token takes the first two experts, which one device has."""
    model = mixture(num_kv_heads=4, num_layers=2)

    def without_router(path, leaf):
        return 0 * leaf if path.endswith("router") else leaf

    with jax.enable_x64(True):
        params = tree.map_with_path(without_router, make_params(model))
        monkeypatch.setattr(comparison, "make_params", lambda model: params)
        wanted = single_device.__wrapped__(model)
        result = on_mesh(model, data=2, expert=2, zero=3)
        found = all_errors(result, wanted)
    assert all(error <= LIMIT for error in found.values())
    _, num_valid, metrics = result[0]
    np.testing.assert_array_equal(metrics["load"], [[num_valid, num_valid, 0, 0]])


# Neither ZeRO's axes nor the order of a pipeline's ticks, which have the same keys.
SAME_DRAWS = [
    dict(pipeline=2, schedule="gpipe", num_microbatches=4),
    dict(pipeline=2, schedule="interleaved", num_chunks=2, is_scanned=False, remat="none"),
    dict(pipeline=2, tensor=2, schedule="zero_bubble", is_scanned=False, remat="none"),
    dict(sequence=2, data=2, zero_axes=("data",)),
    *(dict(sequence=2, data=2, zero=level) for level in (0, 1, 2)),
    dict(data=4, tensor=2, zero=2),
]
DRAWING = SINGLES[: len(AXES)] + PAIRS + VARIANTS


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes",
    [sizes for sizes in DRAWING if sizes not in SAME_DRAWS and ("grin", sizes) not in CASES],
    ids=str,
)
def test_what_tokens_draw_does_not_depend_on_any_mesh(sizes):
    assert_as_on_one_device("grin", sizes)
