"""Checkpoints that an earlier version wrote: a run goes on from them as that version did.

Each archive holds step 3 of a run of six steps, and the losses of all six. They were written at
commit 050746c, on the mesh of tests/tiny.gin, from the corpus that `runs.write_run` writes. That
version chose the held-out documents by their keys.
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxscale.models.config.facts import from_flat
from jaxscale.run.pretrain import pretrain
from jaxscale.train.metrics import read_history
from tests.run import runs

FIXTURES = Path(__file__).parent / "fixtures"
SAVED, STEPS = 3, 6
SIZES = dict(
    vocab_size=264,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    ffn_dim=16,
    max_length=32,
)
MODELS = {
    "dense": from_flat(
        **SIZES, norm="layernorm", use_bias=True, windows=(16,), attention_softcap=20.0
    ),
    "mixture": from_flat(
        **SIZES,
        is_tied=True,
        use_qk_norm=True,
        num_dense_prefix=1,
        moe_pattern=(True,),
        num_experts=4,
        num_active_experts=2,
        expert_dim=8,
        router="sparsemixer_v2",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on_from_a_checkpoint_of_before(name, gin_file, tmp_path):
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    overrides = (f"train.steps={STEPS}", "checkpoint.save_every=3", "data.held_out_by='key'")
    run = runs.load_run(gin_file, tmp_path, *overrides)
    pretrain(run=dataclasses.replace(run, model=MODELS[name], evaluators={}))

    wanted = json.loads((tmp_path / "losses.json").read_text())
    found = {entry["step"]: entry["loss"] for entry in read_history(tmp_path / "metrics.jsonl")}
    assert list(found) == list(range(SAVED + 1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), wanted[SAVED:], rtol=runs.LOSS_TOLERANCE)
