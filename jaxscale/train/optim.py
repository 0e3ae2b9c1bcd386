"""Optimizers and learning-rate schedules, by optax."""

import dataclasses
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxscale import tree
from jaxscale.types import InputError, check_choice, check_not_negative, check_positive, check_types

DECAYED = (
    r".*/(q|k|v|o|gate|up|down|tokens|weights)"  # matrices; not norms, biases, routers or positions
)


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
        weight_decay: decoupled, on parameters whose path matches `decayed`.
        decayed: regular expression over whole paths.
        clip_norm: largest global gradient norm; None for no clipping.
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
    decayed: str = DECAYED
    clip_norm: float | None = 1.0

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
        tree.compile_pattern("OptimizerConfig.decayed", self.decayed)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by the number of finished steps: the last step, at `steps` - 1, has the final one.

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
    config: OptimizerConfig, *, steps: int, dims: Any
) -> optax.GradientTransformation:
    """The optimizer over a parameter tree (None where a parameter is frozen).

    Args:
        config: which.
        steps: of the whole run, for the schedule.
        dims: tree of dim letters, one string a parameter; Muon reads from it which dims are a
            matrix.
    Raises:
        InputError: weights are to decay, but `decayed` matches none.
    """
    schedule = make_schedule(config, steps)

    def decay_mask(params: Any) -> Any:
        return tree.map_with_path(lambda path, _: path in decayed, params)

    decayed = {
        path
        for path, leaf in tree.flatten(tree.select(dims, config.decayed)).items()
        if leaf is not None
    }
    if config.weight_decay and not decayed:
        expected = (
            f"a pattern that matches one of {', '.join(tree.flatten(dims))}, or weight_decay 0"
        )
        raise InputError("OptimizerConfig.decayed", config.decayed, expected)
    if config.name == "adamw":
        optimizer = optax.adamw(
            schedule,
            config.beta1,
            config.beta2,
            config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    elif config.name == "lion":
        optimizer = optax.lion(
            schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay_mask
        )
    else:
        # muon's own AdamW takes no mask for its decay, so decay and rate come after it; -1 undoes
        # its sign.
        direction = muon(
            -1.0,
            beta=config.beta1,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.epsilon,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: _matrix_dims(params, dims),
        )
        decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
        optimizer = optax.chain(direction, decay, optax.scale_by_learning_rate(schedule))
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _matrix_dims(params: Any, dims: Any) -> Any:
    """Which dims of each leaf Muon treats as matrix rows and columns; layers and experts are batch dims."""
    letters = tree.flatten(dims)

    def one(path: str, _: jax.Array) -> MuonDimensionNumbers | None:
        matrix = letters[path].replace("L", "")
        if (
            path.startswith(("embedding", "head"))
            or not set(matrix) & set("NKF")
            or "D" not in matrix
        ):
            return None
        inputs = "D" if matrix.index("D") < len(matrix) - 1 else "NKFH"
        where = [(i, d) for i, d in enumerate(letters[path]) if d not in "LE"]
        reduction = tuple(i for i, d in where if d in inputs)
        return MuonDimensionNumbers(reduction, tuple(i for i, d in where if d not in inputs))

    return tree.map_with_path(one, params)
