"""A running average of the parameters, kept beside the optimizer's moments."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


class AverageState(NamedTuple):
    """The average after some updates.

    Args:
        count: [] int32, updates so far.
        average: as the parameters, in their type; zeros before the first update.
    """

    count: Array
    average: Any


def averaging(decay: float) -> optax.GradientTransformation:
    """Keeps decay * average + (1 - decay) * parameters; the first update's are the first average.

    It comes last, for it takes the updates as they are and passes them on.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; Yao
        et al. 2023, DeepSpeed-Chat (arXiv 2308.01320), whose "EMA" it is.
    """

    def init(params: Any) -> AverageState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AverageState(jnp.zeros((), jnp.int32), zeros)

    def update(
        updates: Any,
        state: AverageState,
        params: Any,
    ) -> tuple[Any, AverageState]:
        is_first = state.count == 0

        def mean(average: Array, new: Array) -> Array:
            wide = accumulator(new)
            # As a sum of both, not by their difference: a forbidden word's bias is -inf.
            moved = decay * accumulator(average) + (1 - decay) * wide
            return jnp.where(is_first, wide, moved).astype(average.dtype)

        new = optax.apply_updates(params, updates)
        average = jax.tree.map(mean, state.average, new)
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformation(init, update)
