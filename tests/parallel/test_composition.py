"""Every axis, every pair and triples of them: loss and every gradient equal one device's, in float64.

With JAXSCALE_MATRIX=FILE each case also runs in float32 and its errors are appended to FILE, of
which `experiments/composition_table.py` makes the table of the README.
"""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.parallel.mesh import AXES
from tests.parallel import test_region
from tests.parallel.test_region import DENSE, MOE, make_params, on_mesh, single_device

MODELS = {
    "dense": dataclasses.replace(DENSE, num_layers=3, num_kv_heads=4, is_tied=True),
    "moe": dataclasses.replace(MOE, num_layers=4, num_kv_heads=4),
}
# What each token draws must not depend on the mesh; the threshold lets most experts be drawn.
MODELS["grin"] = dataclasses.replace(
    MODELS["moe"],
    router="sparsemixer_v2",
    router_threshold=0.8,
    expert_dropout=0.3,
    use_head_bias=True,
)
ROUTERS = "sparsemixer", "sparsemixer_v2_star", "masked_sampling", "densemixer"
MODELS |= {
    name: dataclasses.replace(
        MODELS["grin"], router=name, num_layers=2, num_active_experts=1 + (name != "sparsemixer")
    )
    for name in ROUTERS
}
NUM_MICROBATCHES = 2
LIMIT = 1e-9  # norm of the difference over the norm; of a gradient that is zero, the norm of the difference

SINGLES = [{axis: 2} for axis in AXES] + [{axis: 4} for axis in AXES[:-1]]
PAIRS = [{one: 2, other: 2} for one, other in itertools.combinations(AXES, 2)]
TRIPLES = [dict.fromkeys(three, 2) for three in itertools.combinations(AXES, 3)]
VARIANTS = [
    dict(pipeline=2, schedule="gpipe", num_microbatches=4),
    dict(pipeline=2, schedule="interleaved", num_chunks=2),
    dict(pipeline=2, schedule="interleaved", num_chunks=2, is_scanned=False, remat="none"),
    dict(
        pipeline=2, schedule="interleaved", num_chunks=2, num_periods=5
    ),  # chunks of 2, 1, 1 and 1
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
DEFAULT = [{axis: 2} for axis in AXES]
DEFAULT += [
    dict(pipeline=2, data=2),
    dict(pipeline=2, sequence=2),
    dict(data=2, expert=2),
    dict(sequence=2, tensor=2),
]


def errors(result, wanted):
    """Relative errors of the loss and of each parameter's gradient."""
    ((loss, _, metrics), gradients), (wanted_loss, wanted_gradients) = result, wanted
    if "load" in metrics:
        assert (np.asarray(metrics["load"]).sum(1) == metrics["load"][0].sum()).all() and metrics[
            "load"
        ][0].sum() > 0
    found = {"loss": abs(float(loss) / float(wanted_loss) - 1)}
    for (path, got), want in zip(
        tree.flatten(gradients).items(), jax.tree.leaves(wanted_gradients), strict=True
    ):
        found[path] = np.linalg.norm(got - want) / (np.linalg.norm(want) or 1)
    return found


def check(name, sizes):
    """Runs one case with remat, accumulation and ZeRO-3 unless `sizes` says otherwise."""
    model = MODELS[name]
    settings = {"zero": 3, "num_microbatches": NUM_MICROBATCHES} | sizes
    num_chunks = sizes.get("pipeline", 1) * sizes.get("num_chunks", 1)
    num_periods = settings.pop("num_periods", 2 * num_chunks if num_chunks > 2 else None)
    if num_periods:
        model = dataclasses.replace(model, num_layers=num_periods * model.period)
    with jax.enable_x64(True):
        wanted = single_device(model, 1 if name == "dense" else settings["num_microbatches"])
        found = errors(on_mesh(model, **settings), wanted)
    assert max(found.values()) <= LIMIT, {
        path: error for path, error in found.items() if error > LIMIT
    }
    if file := os.environ.get("JAXSCALE_MATRIX"):
        with jax.enable_x64(True):
            rounded = errors(on_mesh(model, dtype="float32", **settings), wanted)
        line = dict(
            model=name, sizes=sizes, float64=max(found.values()), float32=max(rounded.values())
        )
        with Path(file).open("a") as lines:
            lines.write(json.dumps(line) + "\n")


DRAWN = {"tensor": 2}, {"data": 2, "expert": 2}  # where experts draw in the default tests
CASES = [
    (name, sizes)
    for name in ("dense", "moe")
    for sizes in DEFAULT
    if name == "dense" or sizes not in DRAWN
]
CASES += [("moe", dict(pipeline=2, schedule="zero_bubble", is_scanned=False))]
CASES += [("grin", sizes) for sizes in DRAWN]


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_axes_and_some_pairs(name, sizes):
    check(name, sizes)


LONG = SINGLES + PAIRS + TRIPLES + VARIANTS


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "sizes"),
    [(n, s) for n in ("dense", "moe") for s in LONG if (n, s) not in CASES],
    ids=str,
)
def test_every_pair_and_triple(name, sizes):
    check(name, sizes)


@pytest.mark.long
def test_what_tokens_draw_does_not_depend_on_the_mesh():
    """Where one device rematerialises and the mesh does not."""
    check("grin", dict(data=2, expert=2, tensor=2, num_microbatches=1, remat="none"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name != "densemixer")) for name in ROUTERS],
)
def test_every_router_chooses_and_learns_the_same_on_a_mesh(name):
    check(name, dict(data=2, expert=2))


@pytest.mark.long
def test_no_token_is_dropped_when_all_choose_the_same_device(monkeypatch):
    """All logits are equal, so every token takes the first two experts, which one device of two has."""
    model = dataclasses.replace(MODELS["moe"], num_layers=2)
    with jax.enable_x64(True):
        params = tree.map_with_path(
            lambda path, p: 0 * p if path.endswith("router") else p, make_params(model)
        )
        monkeypatch.setattr(test_region, "make_params", lambda model: params)
        wanted = single_device.__wrapped__(model)
        result = on_mesh(model, data=2, expert=2, zero=3)
        found = errors(result, wanted)
    assert max(found.values()) <= LIMIT
    valid = result[0][1]
    np.testing.assert_array_equal(result[0][2]["load"], [[valid, valid, 0, 0]])


# Neither ZeRO's axes nor the order of a pipeline's ticks, which have the same keys.
SAME_DRAWS = [
    dict(pipeline=2, schedule="gpipe", num_microbatches=4),
    dict(pipeline=2, schedule="interleaved", num_chunks=2, is_scanned=False, remat="none"),
    dict(pipeline=2, tensor=2, schedule="zero_bubble", is_scanned=False, remat="none"),
    dict(sequence=2, data=2, zero_axes=("data",)),
    *(dict(sequence=2, data=2, zero=level) for level in (0, 1, 2)),
    dict(data=4, tensor=2, zero=2),
]
DRAWING = [
    sizes for sizes in SINGLES[: len(AXES)] + PAIRS + VARIANTS if sizes not in (*DRAWN, *SAME_DRAWS)
]


@pytest.mark.long
@pytest.mark.parametrize("sizes", DRAWING, ids=str)
def test_what_tokens_draw_does_not_depend_on_any_mesh(sizes):
    check("grin", sizes)
