"""The train step compiled for eight H200s that are not here: which collectives ZeRO becomes."""

import functools
import importlib.util
import math

import jax
import optax
import pytest

from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import parameter_table
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.attention import attention
from jaxscale.ops.precision import Policy
from jaxscale.parallel.ahead_of_time import collective_bytes, described_devices
from jaxscale.parallel.batch import abstract_batch
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.train.losses import NextTokenLoss
from jaxscale.train.state import abstract_state
from jaxscale.train.step import make_step
from jaxscale.types import InputError

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda13") is None, reason="jax-cuda13-plugin is not installed"
)
MODEL = ModelConfig(
    vocab_size=512, num_layers=2, model_dim=128, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=256, max_length=128
)


def compiled_step(zero):
    """The whole step, data 4 x tensor 2, and what each device must get of the gradients: bytes of its matrices."""
    config = MeshConfig(data=4, tensor=2, zero=zero)
    mesh = make_mesh(config, described_devices("h200", num_hosts=1, gpus_per_host=8))
    specs = make_specs(parameter_table(MODEL), config)
    run_attention = functools.partial(attention, implementation="reference")
    operations = make_operations(config, specs, attention=run_attention, reduction="float32")
    region = Region(mesh, specs, operations)
    loss = NextTokenLoss(MODEL, Policy(), StackConfig(num_loss_chunks=1, remat="none"))
    state = abstract_state(MODEL, optax.adamw(1e-3), mesh=mesh, specs=specs, dtype="float32", trainable=".*")
    compiled = make_step(loss, optax.adamw(1e-3), region, state).lower(state, abstract_batch(mesh, 4, 128)).compile()
    return collective_bytes(compiled.as_text())


def matrix_bytes():
    return [4 * math.prod(p.shape) // 2 for p in jax.tree.leaves(parameter_table(MODEL)) if len(p.dims.strip("L")) > 1]


@needs_plugin
def test_zero_2_reduces_gradients_by_scattering():
    """One reduce-scatter carries every matrix's gradient; what all-reduces is norms, their scales and figures."""
    found = collective_report(2)
    assert max(found["reduce-scatter"]) >= sum(matrix_bytes()) // 4
    assert max(found["all-reduce"]) < min(matrix_bytes()) // 4


@needs_plugin
@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 3])
def test_zero_3_gathers_and_scatters_by_layer_and_zero_0_does_neither(zero):
    found = collective_report(zero)
    if zero == 0:
        assert max(found["all-reduce"]) >= sum(matrix_bytes()) // 2
    else:
        assert max(found["all-reduce"]) < min(matrix_bytes()) // 4
        assert sum(found["reduce-scatter"]) >= min(matrix_bytes())
        assert max(found["reduce-scatter"] + found["all-gather"]) < sum(matrix_bytes())


def collective_report(zero):
    """Collectives by kind, printed as a table."""
    found = compiled_step(zero)
    print(f"\nZeRO {zero}: collectives of one step on 8 H200, data 4 x tensor 2")
    for kind, sizes in found.items():
        print(f"  {kind:20} {len(sizes):3}  {sum(sizes):10,} bytes, largest {max(sizes, default=0):10,}")
    return found


def test_bytes_are_read_from_the_text():
    hlo = """
      %a = ((f32[2,3]{1,0}), f32[4,3]{1,0}) all-gather-start(%x), channel_id=1
      %b = f32[4,3]{1,0} all-gather-done(%a)
      %c = (bf16[8]{0}, f32[]) all-reduce(%y, %z), to_apply=%add
      ROOT %d = pred[5]{0} collective-permute(%c)
    """
    found = collective_bytes(hlo)
    assert found["all-gather"] == [48]
    assert found["all-reduce"] == [20]
    assert found["collective-permute"] == [5]
    assert found["reduce-scatter"] == found["all-to-all"] == []


def test_an_unknown_machine_is_named():
    with pytest.raises(InputError, match="machine: given 'h300', expected one of 'h200'"):
        described_devices("h300", num_hosts=1, gpus_per_host=8)
