"""Train steps compile for TPUs that are not here; none has ever run on one."""

import jax
import pytest

from jaxscale.launch import tpu
from jaxscale.launch.ahead_of_time import as_on, memory_of
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import make_setup
from jaxscale.train.step import make_step
from jaxscale.types import InputError

needs_compiler = pytest.mark.skipif(
    not tpu.has_compiler(), reason="libtpu is not installed: pip install 'jaxscale[tpu]'"
)
DENSE = dict(
    vocab_size=512,
    num_layers=2,
    model_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    ffn_dim=512,
    max_length=256,
)
MIXTURE = DENSE | dict(moe_pattern=(True,), num_experts=4, expert_dim=256, router="sparsemixer_v2")


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize(
    ("topology", "model", "sizes"),
    [
        ("v5e:2x4", DENSE, dict(data=2, sequence=2, tensor=2, zero=3)),
        ("v5e:2x4", MIXTURE, dict(expert=2, sequence=2, tensor=2)),
        ("v5p:2x2x2", DENSE, dict(data=2, sequence=2, ring=2, tensor=2)),
        ("v5p:2x2x4", MIXTURE, dict(data=2, expert=2, sequence=2, tensor=2, zero=3)),
    ],
    ids=["dense_v5e", "mixture_v5e", "dense_ring_v5p", "mixture_v5p"],
)
def test_the_train_step_compiles_for_a_tpu(topology, model, sizes, caplog):
    devices, config = tpu.described_chips(topology), from_flat(**model)
    setup = make_setup(
        table=parameter_table(config),
        loss_fn=NextTokenLoss(config, Policy(), ExecutionConfig(num_loss_chunks=1)),
        mesh=MeshConfig(**sizes),
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(steps=1),
        devices=devices,
    )
    batch = abstract_batch(setup.mesh, 8, 256, is_packed=True)
    with as_on(devices), caplog.at_level("INFO", logger="jaxscale"):
        lowered = make_step(setup).lower(setup.state, batch)
    text = lowered.as_text()
    assert "mosaic_gpu" not in text and "triton" not in text and "cudnn" not in text
    is_ring = sizes.get("ring", 1) > 1
    assert ("tpu_custom_call" in text) != is_ring
    chosen = "block attention: backend reference" if is_ring else "attention: backend splash"
    assert chosen in caplog.text
    memory = memory_of(lowered.compile())
    assert 0 < memory.peak < tpu.MEMORY_BYTES[topology.partition(":")[0]]


@needs_compiler
def test_a_grid_of_chips_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="topology: given 'v5e:3x5', expected a grid of chips"):
        tpu.described_chips("v5e:3x5")


def test_a_missing_compiler_and_an_unknown_tpu_are_named(monkeypatch):
    monkeypatch.setattr(tpu, "has_compiler", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'jaxscale\[tpu\]'"):
        tpu.described_chips("v5e:2x4")
    with pytest.raises(InputError, match="topology: given 'v9:2x4', expected KIND"):
        tpu.described_chips("v9:2x4")
    assert jax.default_backend() != "tpu"
