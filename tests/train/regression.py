"""Small regression networks that are no decoders: their parameters, losses and loader.

The first has two layers, `wide` and `narrow`, column- and row-parallel under tensor parallelism:

    y = w2^T tanh(w1^T x + b1) + b2, loss = sum over tokens of weight * |y - target|^2

The second is a stack of residual layers, with the loss in the parts that pipeline stages run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.models.parameters import Parameter
from jaxscale.types import Array, Batch, Role

SIZES = dict(D=4, F=8)
NUM_ROWS, LENGTH = 8, 6


def entry(dims: str, role: Role, **more: Any) -> Parameter:
    return Parameter(dims, tuple(SIZES[letter] for letter in dims), role, **more)


TABLE = {
    "wide": {
        "weights": entry("DF", Role.MATRIX, std=0.5),
        "offset": entry("F", Role.BIAS),
    },
    "narrow": {
        "weights": entry("FD", Role.MATRIX, std=0.5, learning_rate_factor=0.5),
        "offset": entry("D", Role.BIAS),
    },
}


def squared_error(params, batch, key, *, operations):
    """The loss, as sums over this device's own tokens."""
    collectives = operations.collectives
    wide = collectives.gather_parameters("wide", params["wide"])
    narrow = collectives.gather_parameters("narrow", params["narrow"])

    def column(x):
        return jnp.tanh(x @ wide["weights"] + wide["offset"]), None

    def row(hidden):
        return hidden @ narrow["weights"]

    x = collectives.own_tokens(batch["features"])
    y, _ = collectives.column_then_row(column, row, x)
    error = y + narrow["offset"] - collectives.own_tokens(batch["targets"])
    weights = collectives.own_tokens(batch["weights"])
    loss = ((error**2).sum(-1) * weights).sum()
    return loss, weights.sum(), {"squared_error": loss}


def make_stack(num_layers: int) -> dict[str, Any]:
    """The parameter table of a stack for `StackError`."""
    num = (num_layers,)
    return {
        "start": {"offset": entry("D", Role.BIAS, std=0.5)},
        "layers": {
            "0": {
                "up": Parameter("LDF", num + TABLE["wide"]["weights"].shape, Role.MATRIX, 0.5),
                "down": Parameter("LFD", num + TABLE["narrow"]["weights"].shape, Role.MATRIX, 0.5),
            }
        },
    }


@dataclasses.dataclass(frozen=True)
class StackError:
    """Squared error after x <- x + down^T tanh(up^T x) in each layer, without tensor parallelism.

    Args:
        change: applied to what the last layer returns.
    """

    change: Callable[[Array], Array] = lambda x: x
    is_by_period = False

    def start(self, params, batch, *, operations):
        return batch["features"] + params["start"]["offset"]

    def prepare(self, layers):
        return layers

    def body(self, layers, x, batch, number, is_real, *, operations):
        def one(x, layer):
            params, is_real = layer
            y = x + jnp.tanh(x @ params["up"]) @ params["down"]
            return jnp.where(is_real, y, x), None

        is_real = jnp.ones(len(number), bool) if is_real is None else is_real
        x, _ = lax.scan(one, x, (layers["0"], is_real))
        return x, jnp.zeros(()), {}

    def finish(self, params, x, batch, *, operations):
        error = self.change(x) - batch["targets"]
        weights = batch["weights"]
        loss = ((error**2).sum(-1) * weights).sum()
        return loss, weights.sum(), {"squared_error": loss}


def make_rows(number: int, num_valid_rows: int = NUM_ROWS) -> Batch:
    """Batch `number`; its rows have ever fewer valid tokens, the last rows none."""
    rng = np.random.default_rng(number)
    features = rng.normal(size=(NUM_ROWS, LENGTH, SIZES["D"])).astype(np.float32)
    rows, tokens = np.ogrid[:NUM_ROWS, :LENGTH]
    is_valid = (tokens < LENGTH - rows % 3) & (rows < num_valid_rows)
    return {
        "features": features,
        "targets": np.sin(features[..., ::-1]),
        "weights": is_valid.astype(np.float32),
    }


class Loader:
    """Batch n is a function of n alone; the position is the number of the next one."""

    def __init__(self):
        self.number = 0

    def __next__(self) -> Batch:
        self.number += 1
        return make_rows(self.number - 1)

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def abstract_rows(sharding: jax.sharding.Sharding) -> Batch:
    """A batch as shapes."""
    return jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding),
        make_rows(0),
    )
