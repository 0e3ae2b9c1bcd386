"""Paired runs: alike where the seed says so, evaluated by domain, and no row seen twice."""

import dataclasses

import numpy as np
import pytest
from grin_study.arms import make_arm, run_seed

from jaxscale.checkpoint.manager import CheckpointConfig
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.evaluate.perplexity import BitsPerByte
from jaxscale.models.config import AttentionConfig, ExpertsConfig, LayerConfig, ModelConfig
from jaxscale.models.execution import ExecutionConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.run.run import Run
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.types import InputError

EXPERTS = ExpertsConfig(num_experts=4, dim=16)
MODEL = ModelConfig(
    vocab_size=257,
    num_layers=1,
    model_dim=16,
    max_length=32,
    pattern=(LayerConfig(AttentionConfig(2, 1, 8), EXPERTS),),
)
ALPHABETS = {"letters": range(97, 123), "digits": range(48, 58)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains of 30 files: letters and digits."""
    root = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    for domain, alphabet in ALPHABETS.items():
        folder = root / domain
        folder.mkdir()
        for i in range(30):
            text = "".join(map(chr, rng.choice(alphabet, 40)))
            (folder / f"{i}.txt").write_text(text)
    return DataConfig(
        sources=tuple(TextSource((str(root / domain),)) for domain in ALPHABETS),
        sequence_length=32,
        batch_size=8,
        held_out_fraction=0.4,
        cache_directory=str(root / "cache"),
    )


def arm_of(data, **changes):
    run = Run(
        directory="nowhere",
        model=MODEL,
        mesh=MeshConfig(data=8),
        data=data,
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=2),
        checkpoint=CheckpointConfig("nowhere", save_every=1, keep_last=1),
        policy=Policy(compute="float32"),
        execution=ExecutionConfig(num_loss_chunks=1, remat="none"),
    )
    return make_arm("arm", dataclasses.replace(run, **changes))


@pytest.fixture(scope="module")
def arm(data):
    return arm_of(data)


@pytest.mark.long
def test_a_seed_is_a_run(arm):
    first, again = run_seed(arm, 1), run_seed(arm, 1)
    assert first["train_nll"] == again["train_nll"]
    assert first["domains"] == again["domains"]


@pytest.mark.long
def test_arms_start_alike_and_seeds_do_not(arm, data):
    first, other = run_seed(arm, 1), run_seed(arm, 2)
    faster = run_seed(arm_of(data, optimizer=OptimizerConfig(learning_rate=0.1)), 1)
    assert faster["train_nll"][0] == first["train_nll"][0] != other["train_nll"][0]
    assert faster["loss"] != first["loss"]


def test_held_out_loss_is_that_of_all_domains_together(arm, data):
    """Compared with an evaluator that reads all domains in one pass, with the same parameters."""
    seen = []

    def sums(params, *rest):
        seen.append(params)
        return arm.context.sums(params, *rest)

    context = dataclasses.replace(arm.context, sums=sums)
    found = run_seed(dataclasses.replace(arm, context=context), 0)
    trained = dataclasses.replace(arm.context, params=seen[0])
    whole = BitsPerByte(data)(trained)
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert list(found["domains"]) == ["letters", "digits"]
    for domain in found["domains"].values():
        choices = domain["tokens"] * EXPERTS.num_active
        np.testing.assert_allclose(np.sum(domain["load"], axis=-1), choices)


def test_a_run_that_would_see_a_row_twice_is_refused(data):
    arm = arm_of(data, train=TrainConfig(steps=50))
    with pytest.raises(InputError, match=r"steps.*no row comes twice"):
        run_seed(arm, 0)
