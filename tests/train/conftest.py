"""A tiny model, batches without a random generator that could change, and compiled steps shared between tests."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.models.config import ModelConfig
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.plan import Plan, TrainConfig, make_plan
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

MODEL = ModelConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=16,
)
# A large epsilon keeps AdamW's first steps from being mere signs, which would blow rounding up.
OPTIMIZER = OptimizerConfig(learning_rate=0.01, epsilon=1.0)
DATA = DataConfig(sources=(TextSource(("unread",)),), sequence_length=16, batch_size=8)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run without loader and disk; `start` gives a fresh first state for a step to consume."""

    plan: Plan
    step: Any
    first: Any

    def start(self):
        return jax.tree.map(jnp.copy, self.first)


@functools.cache
def _setup(model, mesh, optimizer, train, policy, stack):
    devices = jax.devices()[: math.prod(mesh.sizes)]
    plan = make_plan(
        model=model,
        mesh=mesh,
        data=DATA,
        optimizer=optimizer,
        train=train,
        policy=policy,
        stack=stack,
        devices=devices,
    )
    step = make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state)
    settings = dict(specs=plan.region.specs, seed=0, trainable=train.trainable)
    return Setup(plan, step, init_state(model, plan.optimizer, plan.state, **settings))


@pytest.fixture(scope="session")
def make_setup():
    """Setup by its differences from one device, AdamW and float32; the same differences share their compilations."""

    def make(model=MODEL, mesh=None, optimizer=OPTIMIZER, compute="float32", **train):
        return _setup(
            model,
            mesh or MeshConfig(),
            optimizer,
            TrainConfig(**{"steps": 10} | train),
            Policy(compute=compute),
            StackConfig(num_loss_chunks=1, remat="none"),
        )

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Eight packed rows [8, 16] with ever more padding; the rows of the second half end up with no valid token."""

    def make(number=0, num_valid_rows=4):
        text = (np.arange(8 * 17).reshape(8, 17) * 7 + 3 * number) ** 2 % 31
        segments = np.stack([np.repeat([1, 2, 0], (6, 9 - row, 1 + row)) for row in range(8)])
        positions = np.stack(
            [np.concatenate([np.arange(n) for n in (6, 9 - row, 1 + row)]) for row in range(8)]
        )
        weights = (segments > 0) * (np.arange(8) < num_valid_rows)[:, None]
        tokens, labels = text[:, :-1], text[:, 1:]
        arrays = dict(tokens=tokens, labels=labels, segments=segments, positions=positions)
        return {name: a.astype(np.int32) for name, a in arrays.items()} | {
            "weights": weights.astype(np.float32)
        }

    return make
