"""Paired runs: alike where the seed says so, held out by domain, each row once; and how they are compared."""

import dataclasses

import numpy as np
import pytest

from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.evaluate.perplexity import BitsPerByte
from jaxscale.evaluate.study import compare_arms, make_arm, run_seed
from jaxscale.evaluate.study_report import (
    loss_table,
    plot_loads,
    plot_losses_of_arms,
    plot_routing,
    verdict_table,
)
from jaxscale.models.config import ModelConfig
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.plan import TrainConfig
from jaxscale.types import InputError

MODEL = ModelConfig(
    vocab_size=257,
    num_layers=1,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=32,
    max_length=32,
    moe_pattern=(True,),
    num_experts=4,
    expert_dim=16,
)
NAMES = {"a": "first arm", "b": "second arm"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains of 30 files: letters and digits."""
    root, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    for domain, alphabet in (("letters", range(97, 123)), ("digits", range(48, 58))):
        (root / domain).mkdir()
        for i in range(30):
            (root / domain / f"{i}.txt").write_text("".join(map(chr, rng.choice(alphabet, 40))))
    sources = tuple(TextSource((str(root / domain),)) for domain in ("letters", "digits"))
    return DataConfig(
        sources=sources,
        sequence_length=32,
        batch_size=8,
        held_out_fraction=0.4,
        cache_directory=str(root / "cache"),
    )


def arm_of(data, **changes):
    parts = dict(
        model=MODEL,
        mesh=MeshConfig(data=8),
        data=data,
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=2),
        policy=Policy(compute="float32"),
        stack=StackConfig(num_loss_chunks=1, remat="none"),
    )
    return make_arm("arm", **parts | changes)


@pytest.fixture(scope="module")
def arm(data):
    return arm_of(data)


def test_a_seed_is_a_run(arm):
    first, again = run_seed(arm, 1), run_seed(arm, 1)
    assert first["train_nll"] == again["train_nll"] and first["domains"] == again["domains"]


@pytest.mark.long
def test_arms_start_alike_and_seeds_do_not(arm, data):
    first, other = run_seed(arm, 1), run_seed(arm, 2)
    faster = run_seed(arm_of(data, optimizer=OptimizerConfig(learning_rate=0.1)), 1)
    assert faster["train_nll"][0] == first["train_nll"][0] != other["train_nll"][0]
    assert faster["loss"] != first["loss"]


def test_held_out_loss_is_that_of_all_domains_together(arm, data):
    seen = []
    evaluator = BitsPerByte(data)
    context = dataclasses.replace(
        arm.context, sums=lambda *given: seen.append(given[0]) or arm.context.sums(*given)
    )
    found = run_seed(dataclasses.replace(arm, context=context), 0)
    whole = evaluator(dataclasses.replace(arm.context, params=seen[0]))
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert list(found["domains"]) == ["letters", "digits"]
    for domain in found["domains"].values():
        np.testing.assert_allclose(
            np.sum(domain["load"], -1), domain["tokens"] * MODEL.num_active_experts
        )


def test_a_run_that_would_see_a_row_twice_is_refused(data):
    with pytest.raises(InputError, match=r"steps.*no row comes twice"):
        run_seed(arm_of(data, train=TrainConfig(steps=50)), 0)


def runs_of(losses):
    load = {"load": [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]}
    return [
        {
            "arm": arm,
            "seed": seed,
            "loss": loss,
            "domains": {d: {"loss": loss} | load for d in ("code", "prose")},
        }
        for arm, seeds in losses.items()
        for seed, loss in seeds.items()
    ]


def test_arms_are_compared_seed_by_seed():
    runs = runs_of(
        {"a": {1: 2.0, 0: 1.0, 2: 3.0, 7: 99.0}, "b": {0: 1.001, 1: 2.002, 2: 3.003, 8: -99.0}}
    )
    found = compare_arms(runs, [("a", "b")], margin=0.01)["a", "b"]
    assert found.difference == pytest.approx(-0.002)
    assert found.verdict == "equivalent"


def test_a_repeated_run_is_refused():
    runs = runs_of({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.5}})
    with pytest.raises(
        InputError, match=r"two of arm 'a' and seed 0.*expected one run an arm and seed"
    ):
        compare_arms([*runs, runs[0]], [("a", "b")], margin=0.01)


def test_tables_and_pictures(tmp_path):
    runs = runs_of({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.5}})
    found = compare_arms(runs, [("a", "b")], margin=0.01)
    assert (
        "| first arm - second arm | -0.5000 | -0.5000 to -0.5000 | 1 | different |"
        in verdict_table(found, NAMES)
    )
    assert "| second arm | 2.0000 |" in loss_table(runs, NAMES)
    plot_losses_of_arms(runs, found, NAMES, tmp_path / "loss.png", margin=0.01)
    plot_loads(runs, NAMES, tmp_path / "load.png")
    plot_routing(runs, NAMES, tmp_path / "routing.png", layer=1)
    for name in ("loss", "load", "routing"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
