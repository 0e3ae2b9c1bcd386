"""A tiny model to train, batches from no random generator, and setups that tests share."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import tree
from jaxscale.models.config import ModelConfig
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import Setup, make_setup
from jaxscale.train.state import TrainState
from jaxscale.train.step import Step, make_step
from jaxscale.types import Batch
from tests.train import regression


def make_model(**differences) -> ModelConfig:
    """Two dense layers, but for what differs."""
    fields = dict(
        vocab_size=32,
        num_layers=2,
        model_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=32,
        max_length=16,
    )
    return from_flat(**fields | differences)


# A large epsilon keeps AdamW's first steps from being mere signs, which would blow rounding up.
OPTIMIZER = OptimizerConfig(learning_rate=0.01, epsilon=1.0)
EXECUTION = ExecutionConfig(num_loss_chunks=1, remat="none")


@dataclasses.dataclass(frozen=True)
class Training:
    """A setup with its step, and a first state of which `start` gives copies to consume."""

    setup: Setup

    @functools.cached_property
    def step(self) -> Step:
        return make_step(self.setup)

    @functools.cached_property
    def first(self) -> TrainState:
        return self.setup.init(0)

    def start(self) -> TrainState:
        return jax.tree.map(jnp.copy, self.first)

    def run(self, *batches: Batch, state: TrainState | None = None):
        """(state, metrics) after a step on each batch."""
        state = self.start() if state is None else state
        for batch in batches:
            state, metrics = self.step(state, place(self.setup.mesh, batch))
        return state, metrics


def make_training(
    model: ModelConfig | None = None,
    mesh: MeshConfig = MeshConfig(),
    optimizer: OptimizerConfig = OPTIMIZER,
    compute: str = "float32",
    parameters: str = "float32",
    **train,
) -> Training:
    """By its differences from one device, AdamW and float32; the same ones are compiled once."""
    config = TrainConfig(**{"steps": 10} | train)
    policy = Policy(parameters=parameters, compute=compute)
    return _training(model or make_model(), mesh, optimizer, config, policy)


@functools.cache
def _training(model, mesh, optimizer, train, policy) -> Training:
    loss_fn = NextTokenLoss(model, policy, EXECUTION, z_loss=train.z_loss)
    return _on(mesh, parameter_table(model), loss_fn, optimizer, train, policy)


@functools.cache
def make_regression(
    mesh: MeshConfig = MeshConfig(),
    optimizer: OptimizerConfig = OPTIMIZER,
    **train,
) -> Training:
    """As `make_training`, of the regression network, whose steps compile in a second."""
    train = TrainConfig(**{"steps": 10} | train)
    policy = Policy(compute="float32")
    return _on(mesh, regression.TABLE, regression.squared_error, optimizer, train, policy)


def make_stacked(
    num_layers: int,
    mesh: MeshConfig,
    loss_fn: Any = regression.StackError(),
) -> Training:
    """Of a small stack of residual layers, which a pipeline can cut."""
    table = regression.make_stack(num_layers)
    train = TrainConfig(steps=10, num_microbatches=2)
    return _on(mesh, table, loss_fn, OPTIMIZER, train, Policy(compute="float32"))


def _on(mesh, table, loss_fn, optimizer, train, policy) -> Training:
    setup = make_setup(
        table=table,
        loss_fn=loss_fn,
        mesh=mesh,
        optimizer=optimizer,
        train=train,
        policy=policy,
        devices=jax.devices()[: math.prod(mesh.sizes)],
    )
    return Training(setup)


def make_batch(number: int = 0, num_valid_rows: int = 4) -> Batch:
    """Eight packed rows [8, 16] with ever more padding.

    Only the first rows have valid tokens, `num_valid_rows` of them.
    """
    text = (np.arange(8 * 17).reshape(8, 17) * 7 + 3 * number) ** 2 % 31
    lengths = [(6, 9 - row, 1 + row) for row in range(8)]
    segments = np.stack([np.repeat([1, 2, 0], each) for each in lengths])
    positions = np.stack([np.concatenate(list(map(np.arange, each))) for each in lengths])
    is_valid_row = np.arange(8) < num_valid_rows
    weights = (segments > 0) * is_valid_row[:, None]
    return {
        "tokens": text[:, :-1].astype(np.int32),
        "labels": text[:, 1:].astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def flat(state: TrainState) -> dict[str, np.ndarray]:
    """A copy of every leaf by path, the random key as its words."""
    leaves = tree.flatten(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return {path: np.array(leaf) for path, leaf in leaves.items()}


def assert_same_bits(got: TrainState, wanted: TrainState) -> None:
    wanted = flat(wanted)
    for path, leaf in flat(got).items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


def assert_close(got: TrainState, wanted: TrainState, tolerance: float) -> None:
    wanted = flat(wanted)
    for path, leaf in flat(got).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=tolerance, atol=tolerance, err_msg=path)
