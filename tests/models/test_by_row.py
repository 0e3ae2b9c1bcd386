"""Which layers kernels compute with invariant bits on a Hopper GPU, and that all of it fits."""

import jax
import jax.numpy as jnp
import pytest

from jaxscale.models import by_row
from jaxscale.models.config import NormConfig
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import BatchInvariant, ExecutionConfig
from jaxscale.models.losses import token_log_probabilities
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops import device
from jaxscale.ops.precision import Policy

SHAPE = dict(vocab_size=128, model_dim=64, num_heads=2, num_kv_heads=1, head_dim=64, ffn_dim=128)
EXPERTS = dict(num_experts=4, expert_dim=64, moe_pattern=(True,))
pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")


@pytest.fixture(autouse=True)
def _on_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(device.described, "compute_capability", lambda: device.HOPPER)


def make(compute="bfloat16", **changes):
    """(decoder, shapes of its parameters)."""
    model = from_flat(**SHAPE | dict(max_length=128, num_layers=1) | changes)
    execution = ExecutionConfig(strategy=BatchInvariant(), is_scanned=False, remat="none")
    decoder = Decoder(model, execution.operations(), Policy(compute=compute), execution)
    return decoder, abstract_params(parameter_table(model), compute)


@pytest.mark.parametrize(
    ("changes", "has_kernels"),
    [
        (dict(), True),
        (EXPERTS, False),
        (dict(compute="float32"), False),
        (dict(head_dim=32), False),
    ],
    ids=["dense", "experts", "float32", "narrow heads"],
)
def test_a_layer_is_computed_by_kernels_or_in_tiles(changes, has_kernels):
    decoder, params = make(**changes)
    layer, dtype = decoder.config.layers[0], decoder.policy.compute
    of_layer = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), params["layers"]["0"]
    )
    found = by_row.layer_has_kernels(of_layer, layer, NormConfig(), dtype)
    assert found == has_kernels
    assert not by_row.layer_has_kernels(of_layer, layer, NormConfig("layernorm"), dtype)
    assert by_row.are_ends_by_row(decoder) == (dtype == "bfloat16")


def test_a_training_step_of_kernels_has_a_gradient_of_every_parameter():
    decoder, params = make()
    batch = {name: jnp.zeros((2, 128), jnp.int32) for name in ("tokens", "positions")}

    def loss(params):
        x, _, _ = decoder.run_layers(params, decoder.embed(params, batch), decoder.tokens(batch))
        return token_log_probabilities(decoder, params, x, batch["tokens"]).sum()

    value, gradient = jax.eval_shape(jax.value_and_grad(loss), params)
    assert value.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), gradient) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
