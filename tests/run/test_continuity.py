"""Cells of the loss-continuity matrix that cover every source and target mesh once.

The whole matrix is run by experiments/checkpoints/continuity.py.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "checkpoints" / "continuity.py"
spec = importlib.util.spec_from_file_location("continuity", SCRIPT)
continuity = importlib.util.module_from_spec(spec)
sys.modules["continuity"] = continuity  # dataclasses look their module up
spec.loader.exec_module(continuity)

DENSE = (
    ("pipeline2_tensor2_data2_zero2", "one"),
    ("one", "pipeline2_interleaved"),
    ("data8_zero3", "sequence2_data2_zero3"),
    ("tensor2", "data8_zero3"),
    ("sequence2_data2_zero3", "pipeline4_data2_zero1"),
)
MOE = (
    ("expert2_tensor2_data2_zero3", "one"),
    ("expert4", "expert2_data2_zero1"),
    ("data4_zero1", "pipeline2_expert2"),
    ("pipeline2", "expert2_tensor2_data2_zero3"),
)


@pytest.fixture(scope="module", params=["dense", "moe"])
def study(request, tmp_path_factory):
    """A study in float32, and the losses of one device that nothing interrupted."""
    study = continuity.Study(request.param, "float32", tmp_path_factory.mktemp("continuity"))
    last = continuity.BEFORE + continuity.AFTER
    _, whole = study.losses("one", study.setup("one").init(0), 0, last)
    return study, whole[continuity.BEFORE :]


@pytest.mark.long
def test_losses_go_on_wherever_a_run_is_resumed(study):
    study, whole = study
    first_limit, last_limit = continuity.TOLERANCES["float32"]
    for source, target in DENSE if study.model == "dense" else MOE:
        study.save(source)
        first, last = continuity.errors(study.resume(source, target), whole)
        assert first <= first_limit, (source, target)
        assert last <= last_limit, (source, target)
