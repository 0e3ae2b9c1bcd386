"""One training step: gradient, clipping, update; a broken step is kept out of the state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxscale import tree
from jaxscale.train.host import update_in_parts
from jaxscale.train.setup import Setup, epochs_of
from jaxscale.train.state import TrainState
from jaxscale.types import Batch

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_step(setup: Setup) -> Step:
    """Compiles step(state, batch) -> (state, metrics); the state is donated.

    A loss or gradient norm that is not finite leaves parameters, optimizer and step as they were
    and clears `is_finite`, so that no later step changes them either. Parameters that an update
    broke are found by the next step.

    A loss that has `num_epochs` makes so many updates of one step, all by the same batch. Metrics
    are then means over them, and of a broken step the updates before the broken one stay.

    Args:
        setup: model, loss, mesh and optimizer.
    Returns:
        The step. Its metrics: means over what the loss counts, such as valid tokens or pairs of
        answers (`loss`, and each scalar that the loss reports, such as `nll`), arrays that the loss
        reports as sums (`load`), how many it counts (`weight`), the learning rate, the norm of the
        gradients, and that of the parameters before the step.
    """
    region = setup.region
    gradient = region.gradient(setup.loss_fn)
    num_epochs = epochs_of(setup.loss_fn)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if num_epochs == 1:
            new, metrics = epoch(state, batch)
        else:
            new, every = lax.scan(lambda now, _: epoch(now, batch), state, length=num_epochs)
            metrics = {name: x.mean(0) for name, x in every.items()}
        number = jnp.where(new.is_finite, state.step + 1, state.step)
        return dataclasses.replace(new, step=number), metrics | {"is_finite": new.is_finite}

    def epoch(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, weight, sums), gradients = gradient(state.params, batch, key)
        scale = jnp.where(weight > 0, 1 / weight, 0)
        gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        gradient_norm = optax.tree.norm(gradients)
        trained = tree.select(state.params, region.trainable)
        # The norm of the parameters before the update: XLA fuses that sum with their conversion to
        # the compute type, where the norm of the new ones would slow the update down (3.4 of 224 ms
        # on an H200). A bad update shows one step later.
        parameter_norm = setup.norm(trained)
        is_finite = state.is_finite
        for figure in (loss, gradient_norm, parameter_norm):
            is_finite = is_finite & jnp.isfinite(figure)
        update = functools.partial(_update, setup.optimizer, is_finite)
        if region.specs.is_optimizer_on_host:
            update = functools.partial(update_in_parts, update, after=is_finite)
        trained, opt_state = update(gradients, state.opt_state, trained)
        means = {name: x * scale if x.ndim == 0 else x for name, x in sums.items()}
        metrics = {
            **means,
            "loss": loss * scale,
            "weight": weight,
            "learning_rate": setup.learning_rates(state.step),
            "gradient_norm": gradient_norm,
            "parameter_norm": parameter_norm,
        }
        params = tree.merge(trained, state.params)
        return TrainState(state.step, params, opt_state, state.key, is_finite), metrics

    # The optimizer state's layout makes each device update its share of the parameters.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _update(
    optimizer: optax.GradientTransformation,
    is_finite: jax.Array,
    gradients: Any,
    opt_state: Any,
    trained: Any,
) -> tuple[Any, Any]:
    """The new parameters and optimizer state; the old ones if something was not finite."""
    updates, new_state = optimizer.update(gradients, opt_state, trained)
    new = optax.apply_updates(trained, updates), new_state
    old = trained, opt_state
    return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)
