"""A model with one score in the place of logits, as a folder of every family that has it so."""

import dataclasses
import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from jaxscale import tree
from jaxscale.convert.folder import CONFIG, open_folder, write_folder
from jaxscale.types import InputError
from tests.convert.test_families import FIXTURES, NAMES, folder, params, placed

WITHOUT = ("bert", "olmoe")
TUNED = [(name, True) for name in NAMES if name not in WITHOUT]  # by the folder's config.json
NEW = [("gpt2", False), ("llama", False), ("phi3", False)]


def scored(name):
    """(a family's model with a value head, its parameters)."""
    weights = np.random.default_rng(0).normal(size=(1, folder(name).config.model_dim))
    trunk = {part: leaves for part, leaves in params(name).items() if part != "head"}
    head = {"value_head": {"weights": weights.astype(np.float32)}}
    return dataclasses.replace(folder(name).config, use_value_head=True), trunk | head


@pytest.mark.parametrize(("name", "is_kept"), TUNED + NEW)
def test_a_value_head_is_the_score_of_transformers_and_is_read_again(name, is_kept, tmp_path):
    config, wanted = scored(name)
    like = FIXTURES / name / CONFIG if is_kept else None
    write_folder(tmp_path, config, wanted, dtype=np.dtype("float32"), like=like)
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"], wanted["value_head"]["weights"])
    assert "lm_head.weight" not in tensors
    about = json.loads((tmp_path / CONFIG).read_text())
    (architecture,) = about["architectures"]
    assert architecture.endswith("ForSequenceClassification") and hasattr(
        transformers, architecture
    )
    assert about["id2label"] == {"0": "LABEL_0"}
    read = open_folder(tmp_path)
    assert read.config == config
    found = tree.flatten(read.params(placed(config, "float32")))
    for path, leaf in tree.flatten(wanted).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_family_without_a_score_is_refused(name, tmp_path):
    config, wanted = scored(name)
    family = folder(name).values["model_type"]
    with pytest.raises(InputError, match=r"a family that has use_value_head = True"):
        write_folder(tmp_path, config, wanted, dtype=np.dtype("float32"), family=family)
