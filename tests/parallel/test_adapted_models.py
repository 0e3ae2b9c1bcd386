"""What imported models bring, on a mesh: adapters, LongRoPE of cut documents, shared experts."""

import dataclasses

import jax
import pytest

from jaxscale.models.config import LongRopeScaling, LoraConfig, RotaryConfig
from tests.parallel import comparison

LORA = dataclasses.replace(comparison.DENSE, lora=LoraConfig(rank=2))
# The batch's documents have 6 and 7 tokens, and 7 tokens lie on both sides of a cut.
SCALING = LongRopeScaling((1.0, 1.1, 1.2, 1.3), 1.1, (2.0, 3.0, 4.0, 5.0), 1.3, 6)
BASE = comparison.dense(num_layers=1, use_qk_norm=False)
LAYER = BASE.pattern[0]
ATTENTION = dataclasses.replace(LAYER.attention, rotary=RotaryConfig(scaling=SCALING))
LONG_ROPE = dataclasses.replace(BASE, pattern=(dataclasses.replace(LAYER, attention=ATTENTION),))
MIXED = comparison.mixture(num_layers=1, moe_pattern=(True,), windows=(None,))
EXPERTS = dataclasses.replace(MIXED.pattern[0].feed_forward, shared_dim=8)
SHARED = dataclasses.replace(
    MIXED, pattern=(dataclasses.replace(MIXED.pattern[0], feed_forward=EXPERTS),)
)
MESHES = {
    "adapters": (LORA, dict(data=2, tensor=2, zero=3)),
    "sequence": (LONG_ROPE, dict(sequence=2, tensor=2)),
    "shared expert": (SHARED, dict(expert=2, tensor=2)),
    "shared expert, whole experts": (SHARED, dict(data=2, tensor=2, expert_axis="tensor")),
    "ring": (LONG_ROPE, dict(sequence=2, ring=2)),
}


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_are_those_of_one_device(name):
    model, sizes = MESHES[name]
    with jax.enable_x64(True):
        result = comparison.on_mesh(model, **sizes)
        comparison.assert_equal_to_single_device(result, comparison.single_device(model))
