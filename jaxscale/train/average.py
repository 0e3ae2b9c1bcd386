"""A running average of the parameters, kept beside the optimizer's moments."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxscale import tree
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


class AverageState(NamedTuple):
    """The average after some updates.

    Args:
        count: [] int32, updates so far.
        average: as the parameters, in at least float32; zeros before the first update, and None for
            a parameter that has none.
    """

    count: Array
    average: Any


def averaging(decay: float, averaged: Collection[str]) -> optax.GradientTransformation:
    """Keeps decay * average + (1 - decay) * parameters; the first update's are the first average.

    It comes last, for it takes the updates as they are and passes them on. In bfloat16 the average
    would stand still: what a step adds to it is less than the distance of two numbers.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; Yao
        et al. 2023, DeepSpeed-Chat (arXiv 2308.01320), whose "EMA" it is.
    Args:
        decay: the share of the past.
        averaged: paths of the parameters that have an average.
    """

    def init(params: Any) -> AverageState:
        def zeros(path: str, leaf: Array) -> Array | None:
            return jnp.zeros_like(accumulator(leaf)) if path in averaged else None

        return AverageState(jnp.zeros((), jnp.int32), tree.map_with_path(zeros, params))

    def update(
        updates: Any,
        state: AverageState,
        params: Any,
    ) -> tuple[Any, AverageState]:
        is_first = state.count == 0
        averages = tree.flatten(state.average)

        def mean(path: str, new: Array) -> Array | None:
            if path not in averages:
                return None
            new = accumulator(new)
            # As a sum of both, not by their difference: a forbidden word's bias is -inf.
            moved = decay * averages[path] + (1 - decay) * new
            return jnp.where(is_first, new, moved)

        new = optax.apply_updates(params, updates)
        return updates, AverageState(state.count + 1, tree.map_with_path(mean, new))

    return optax.GradientTransformation(init, update)
