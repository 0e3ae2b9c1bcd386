"""What Hugging Face's TRL says of a model and its pairs, from files to figures."""

import json
import shutil
from pathlib import Path

import pytest

from jaxscale import cli

FIXTURE = Path(__file__).parent / "fixtures" / "trl"
PAIRS = """
from __gin__ import dynamic_registration
from jaxscale import run
include '{folder}/adapted/config.gin'
run.Run.loss = @run.dpo_loss
run.dpo_loss.beta = {beta}
run.Run.evaluators = {{'preferences': @run.PreferenceAccuracy()}}
run.DataConfig.sources = (@run.PreferenceSource(),)
run.PreferenceSource.paths = ('{folder}/pairs.jsonl',)
run.PreferenceSource.tokenizer = '{folder}/base/huggingface'
run.DataConfig.held_out_fraction = 0.999999
run.DataConfig.sequence_length = 128
run.DataConfig.batch_size = 8
run.DataConfig.cache_directory = '{folder}/cache'
run.MeshConfig.data = 8
run.Policy.compute = 'float32'
"""


def test_loss_and_rewards_are_those_of_trl(tmp_path):
    """Written by experiments/preferences/trl_fixture.py; its pairs have answers of many lengths."""
    wanted = json.loads((FIXTURE / "trl.json").read_text())
    shutil.copy(FIXTURE / "pairs.jsonl", tmp_path)
    base, adapted = str(tmp_path / "base"), str(tmp_path / "adapted")
    assert cli.main(["import", str(FIXTURE), f"--set=directory={base}"]) == 0
    assert cli.main(["adapt", base, adapted, f"--set=adapters={FIXTURE / 'adapters'}"]) == 0
    file = tmp_path / "pairs.gin"
    file.write_text(PAIRS.format(folder=tmp_path, beta=wanted["beta"]))
    assert cli.main(["evaluate", str(file)]) == 0
    found = json.loads((tmp_path / "adapted" / "evaluation_0.json").read_text())
    for name, value in wanted["figures"].items():
        assert found[f"preferences/{name}"] == pytest.approx(value, rel=2e-5), name
