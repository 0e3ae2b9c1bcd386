"""Optimizers and learning-rate schedules, by optax."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxscale import tree
from jaxscale.train.average import averaging
from jaxscale.train.eight_bits import in_eight_bits
from jaxscale.types import (
    InputError,
    Role,
    check_choice,
    check_not_negative,
    check_positive,
    check_types,
)

# Matrices; not norms, biases, routers or learned positions.
DECAYED = ("matrix", "expert", "embedding", "unembedding", "value")
MUON_MATRICES = (Role.MATRIX, Role.EXPERT)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with its schedule.

    Args:
        name: "adamw" (arXiv 1711.05101), "muon" (Jordan 2024; matrices by Newton-Schulz, the rest
            by AdamW, both with Nesterov momentum) or "lion" (arXiv 2302.06675).
        learning_rate: peak.
        schedule: after the warm-up, "cosine" or "linear" down to the end, or "wsd" (arXiv
            2404.06395): constant, then linear over the last `decay_fraction`.
        warmup_steps: linear up to the peak, which the last of them has; the first step's rate is
            above 0.
        final_fraction: learning rate at the last step over the peak.
        decay_fraction: share of all steps in which "wsd" decays.
        beta1: decay of the first moment (Muon: its momentum).
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled, on parameters whose role is in `decayed`.
        decayed: roles of parameters, see `types.Role`.
        clip_norm: largest global gradient norm; None for no clipping. Where a run trains a critic
            too, each model's gradients have a norm of their own.
        use_8bit_moments: whether the moments rest in 8 bits, see `train.eight_bits`; otherwise they
            have the type of the stored parameters.
        average_decay: of a running average of the trained parameters, which is kept beside them in
            float32; `jaxscale average` makes a run of it. A critic has none. None for none.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decayed: tuple[str, ...] = DECAYED
    clip_norm: float | None = 1.0
    use_8bit_moments: bool = False
    average_decay: float | None = None

    def __post_init__(self):
        check_types(self)
        check_choice("OptimizerConfig.name", self.name, ("adamw", "muon", "lion"))
        check_choice("OptimizerConfig.schedule", self.schedule, ("cosine", "linear", "wsd"))
        for name in ("learning_rate", "epsilon"):
            check_positive(f"OptimizerConfig.{name}", getattr(self, name))
        for name in ("warmup_steps", "weight_decay"):
            check_not_negative(f"OptimizerConfig.{name}", getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"OptimizerConfig.{name}", getattr(self, name), "0 <= beta < 1")
        if not 0 <= self.final_fraction <= 1 or not 0 <= self.decay_fraction <= 1:
            given = (self.final_fraction, self.decay_fraction)
            raise InputError(
                "OptimizerConfig.final_fraction, decay_fraction", given, "fractions from 0 to 1"
            )
        if self.clip_norm is not None:
            check_positive("OptimizerConfig.clip_norm", self.clip_norm)
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            expected = "0 < decay < 1, or None"
            raise InputError("OptimizerConfig.average_decay", self.average_decay, expected)
        for role in self.decayed:
            check_choice("OptimizerConfig.decayed", role, tuple(map(str, Role)))


def check_moments(config: OptimizerConfig, dtype: str) -> None:
    """Raises InputError if a moment stored in `dtype` would be too coarse to follow its gradients.

    A step moves a moment by 1 - beta of itself at most when the gradients vanish. If that is less
    than the distance of two numbers of the type, it stands still; in 8 bits chance moves it.
    """
    if config.use_8bit_moments:
        return
    step = float(jnp.finfo(dtype).eps)
    for name in ("beta1", "beta2"):
        beta = getattr(config, name)
        if 1 - beta < step:
            expected = (
                f"1 - {name} >= {step:.3g} with Policy.parameters = {dtype!r}, whose numbers are "
                f"so far apart; here it is {1 - beta:.3g}, and the moment would stand still"
            )
            raise InputError(f"OptimizerConfig.{name}", beta, expected)


def learning_rates(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by the number of finished steps; that of the last step is the final one.

    Raises:
        InputError: the warm-up (and for "wsd" the decay) does not fit in `steps`.
    """
    warmup = config.warmup_steps
    decay = round(config.decay_fraction * steps) if config.schedule == "wsd" else 0
    if warmup + decay > steps:
        expected = f"warmup_steps + decay steps <= steps, but {warmup} + {decay} > {steps}"
        raise InputError("OptimizerConfig.warmup_steps", warmup, expected)
    peak = config.learning_rate
    last_at_peak = max((steps - decay if config.schedule == "wsd" else warmup) - 1, 0)
    falling = max(steps - 1 - last_at_peak, 1)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, falling, config.final_fraction)
    else:
        fall = optax.linear_schedule(peak, peak * config.final_fraction, falling)
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, last_at_peak])


def make_optimizer(
    config: OptimizerConfig,
    *,
    steps: int,
    num_epochs: int = 1,
    table: Any,
) -> optax.GradientTransformation:
    """The optimizer over a parameter tree (None where a parameter is frozen).

    Args:
        config: which.
        steps: of the whole run, for the schedule.
        num_epochs: updates of one step, which have one learning rate.
        table: of the parameters; says which are decayed, which are matrices for Muon, and by what
            each one's learning rate is multiplied.
    Raises:
        InputError: weights are to decay, but no parameter has a role in `decayed`.
    """
    entries = tree.flatten(table)
    decayed = {path for path, entry in entries.items() if entry.role in config.decayed}
    if config.weight_decay and not decayed:
        roles = ", ".join(sorted({str(entry.role) for entry in entries.values()}))
        expected = f"some of the model's roles, {roles}, or weight_decay 0"
        raise InputError("OptimizerConfig.decayed", config.decayed, expected)

    def decay_mask(params: Any) -> Any:
        return tree.map_with_path(lambda path, _: path in decayed, params)

    of_steps = learning_rates(config, steps)

    def schedule(num_updates: jax.Array) -> jax.Array:
        return of_steps(num_updates // num_epochs)

    optimizer = _make_direction(config, schedule, decay_mask, entries)
    if config.use_8bit_moments:
        optimizer = in_eight_bits(optimizer)
    factors = {path: entry.learning_rate_factor for path, entry in entries.items()}
    if any(factor != 1 for factor in factors.values()):
        optimizer = optax.chain(optimizer, _scale_by(factors))
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = _clip({path: entry.model for path, entry in entries.items()}, config.clip_norm)
    # The state has the same form with clipping and without, so that a resume may change it.
    parts = clip, optimizer
    if config.average_decay is not None:
        of_policy = {path for path, entry in entries.items() if not entry.model}
        parts = *parts, averaging(config.average_decay, of_policy)
    return optax.chain(*parts)


def _make_direction(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    decay_mask: Callable,
    entries: dict[str, Any],
) -> optax.GradientTransformation:
    """The configured optimizer without clipping and without factors on the learning rate."""
    decay = dict(weight_decay=config.weight_decay, mask=decay_mask)
    if config.name == "adamw":
        return optax.adamw(schedule, config.beta1, config.beta2, config.epsilon, **decay)
    if config.name == "lion":
        return optax.lion(schedule, config.beta1, config.beta2, **decay)
    # Muon's own AdamW takes no mask for its decay, so that decay and rate come after it. A rate of
    # -1 undoes its sign.
    direction = muon(
        -1.0,
        beta=config.beta1,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        eps=config.epsilon,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: _matrix_dims(params, entries),
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _clip(models: dict[str, str], max_norm: float) -> optax.GradientTransformation:
    """Clips by the global norm, of each model apart: a critic's errors do not slow a policy down.

    Args:
        models: by path, which model a parameter is of.
        max_norm: of the gradients of one model.
    """
    if len(set(models.values())) == 1:
        return optax.clip_by_global_norm(max_norm)

    def clip(updates: Any, params: Any = None) -> Any:
        by_model = {model: {} for model in models.values()}
        for path, update in tree.flatten(updates).items():
            by_model[models[path]][path] = update
        clipped = {}
        for own in by_model.values():
            factor = max_norm / jnp.maximum(optax.tree.norm(own), max_norm)
            clipped |= {path: update * factor.astype(update.dtype) for path, update in own.items()}
        return tree.map_with_path(lambda path, _: clipped[path], updates)

    return optax.stateless(clip)


def _scale_by(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by its own factor."""

    def scale(updates: Any, params: Any = None) -> Any:
        return tree.map_with_path(lambda path, update: update * factors[path], updates)

    return optax.stateless(scale)


def _matrix_dims(params: Any, entries: dict[str, Any]) -> Any:
    """Which dims of each leaf are rows and columns for Muon; layers and experts are batch dims."""

    def one(path: str, _: jax.Array) -> MuonDimensionNumbers | None:
        entry = entries[path]
        if entry.role not in MUON_MATRICES:
            return None
        matrix = [i for i, letter in enumerate(entry.dims) if letter not in "LE"]
        # A matrix that reads the model dim has it first. Of the others the last dim is the output.
        num_inputs = 1 if entry.dims[matrix[0]] == "D" else len(matrix) - 1
        rows, columns = matrix[:num_inputs], matrix[num_inputs:]
        return MuonDimensionNumbers(tuple(rows), tuple(columns))

    return tree.map_with_path(one, params)
