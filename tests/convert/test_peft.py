"""Adapters of PEFT: its own logits, and the same adapters after a round trip.

experiments/peft_fixtures.py has made the folders fixtures/peft_*.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxscale.convert.peft import WEIGHTS, read_adapters, write_adapters
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.lora import merged, with_adapters
from jaxscale.ops.precision import Policy
from jaxscale.types import InputError
from tests.convert.test_families import FIXTURES, assert_close, folder, params

NAMES = ("llama", "phi3")


def read(name, path):
    return read_adapters(path, folder(name).config, folder(name).family.layout)


def adapted(name, path):
    """(the model with the adapters of a folder, its parameters)."""
    found = read(name, path)
    config = dataclasses.replace(folder(name).config, lora=found.lora)
    return config, with_adapters(params(name), config, found.leaves)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(name):
    config, tree = adapted(name, FIXTURES / f"peft_{name}")
    with np.load(FIXTURES / f"peft_{name}" / "logits.npz") as file:
        tokens, wanted = file["tokens"], file["logits"]
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(24), (2, 24))}
    execution = ExecutionConfig(remat="none")
    decoder = Decoder(config, policy=Policy(compute="float32"), execution=execution)
    assert_close(jax.jit(decoder.logits)(tree, batch)[0], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_as_the_same_model(name, tmp_path):
    config, tree = adapted(name, FIXTURES / f"peft_{name}")
    write_adapters(tmp_path, config, folder(name).family.layout, tree)
    again, tree_again = adapted(name, tmp_path)
    got, wanted = merged(tree_again, again.lora), merged(tree, config.lora)
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-6)
    before = json.loads((FIXTURES / f"peft_{name}" / "adapter_config.json").read_text())
    after = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(after["target_modules"]) == sorted(before["target_modules"])
    assert after["lora_alpha"] / after["r"] == before["lora_alpha"] / before["r"]


def changed(tmp_path, change=None, **fields):
    """A folder of adapters with other fields, or with tensors that `change` has changed."""
    path = tmp_path / "peft"
    shutil.copytree(FIXTURES / "peft_llama", path)
    values = json.loads((path / "adapter_config.json").read_text()) | fields
    (path / "adapter_config.json").write_text(json.dumps(values))
    if change is not None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)
    return path


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
BAD = {
    "DoRA": ({"use_dora": True}, "adapter_config.json: use_dora: given True"),
    "pattern": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern: given"),
    "kind": ({"peft_type": "IA3"}, "peft_type: given 'IA3'"),
    "unknown": ({"use_new": True}, "use_new: given True, expected no such field"),
    "rank": ({"r": 4}, r"lora_A.weight and .*given \(\(3, 32\), \(32, 3\)\)"),
    "pair": ({"change": lambda t: t.pop(B)}, "lora_B.weight: given None"),
    "layer": (
        {"change": lambda t: (t.pop(A), t.pop(B))},
        "adapters in every layer; some have none",
    ),
    "module": ({"change": lambda t: t.update(x=t[A])}, "x: given None, expected no such adapter"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_adapters_are_refused_by_name(tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(InputError, match=message):
        read("llama", changed(tmp_path, **changes))


def test_the_scale_of_rank_stabilised_adapters_is_theirs(tmp_path):
    lora = read("llama", changed(tmp_path, use_rslora=True)).lora
    assert lora.scale == pytest.approx(7 / np.sqrt(3))
