"""What a checkpoint records of its model, and how older checkpoints recorded it."""

import dataclasses
import functools
import math
from typing import Any

from jaxscale.models.config.attention import AttentionConfig
from jaxscale.models.config.experts import (
    DenseMixerRouter,
    ExpertsConfig,
    MaskedSamplingRouter,
    SparseMixerRouter,
    TopKRouter,
)
from jaxscale.models.config.feed_forward import FeedForwardConfig
from jaxscale.models.config.model import LayerConfig, ModelConfig, NormConfig
from jaxscale.ops.rotary import RotaryConfig

# They neither shape a parameter nor change what a trained model computes.
TRAINING_ONLY = (
    "init_std",
    "width_multiplier",
    "balance_loss",
    "z_loss",
    "expert_gradient",
    "dropout",
)


def checkpoint_facts(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `checkpoint.Checkpoints` that say which model a checkpoint is of.

    Returns:
        `fingerprint`, the fields that shape the parameters or say what they compute; and `upgrade`,
        which makes a fingerprint of today out of one that is older than a field, or than the parts
        of a configuration.
    """
    return {
        "fingerprint": _facts(config),
        "upgrade": functools.partial(_upgraded, config),
    }


def _facts(value: Any) -> Any:
    """A configuration as nested dicts; a tuple of parts as a dict by index."""
    if isinstance(value, ModelConfig) and not value.use_learned_positions:
        # No parameter has it then, and a longer context needs no other model.
        return _fields(value, but=("max_length",))
    value = _once_trained(value)
    if dataclasses.is_dataclass(value):
        return _fields(value)
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return {str(i): _facts(item) for i, item in enumerate(value)}
    return value


def _fields(value: Any, but: tuple[str, ...] = ()) -> dict[str, Any]:
    wanted = [field.name for field in _recorded(value) if field.name not in but]
    kind = {} if isinstance(value, ModelConfig) else {"type": _kind(value)}
    return kind | {name: _facts(getattr(value, name)) for name in wanted}


def _recorded(value: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(value) if field.name not in TRAINING_ONLY]


def _once_trained(value: Any) -> Any:
    """A router as it computes without draws; two that then do the same are the same model's."""
    is_drawing = isinstance(value, DenseMixerRouter | MaskedSamplingRouter)
    if is_drawing and not isinstance(value, SparseMixerRouter):
        return TopKRouter()
    return value


def _completed(saved: Any, value: Any) -> Any:
    """The facts that a checkpoint has recorded of `value`, with those that are newer than it.

    A field that the checkpoint lacks had its default then. A part that it has of another kind, or
    has not at all, stays as it is.
    """
    value = _once_trained(value)
    if not isinstance(saved, dict):
        return saved
    if isinstance(value, tuple):
        parts = {str(i): item for i, item in enumerate(value)}
        return {name: _completed(item, parts.get(name)) for name, item in saved.items()}
    if not dataclasses.is_dataclass(value) or saved.get("type", "ModelConfig") != _kind(value):
        return saved
    found = dict(saved)
    for field in _recorded(value):
        if field.name in saved:
            found[field.name] = _completed(saved[field.name], getattr(value, field.name))
        elif field.default is not dataclasses.MISSING:
            found[field.name] = _facts(field.default)
    return found


def _kind(value: Any) -> str:
    return type(value).__name__


def _upgraded(config: ModelConfig, saved: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of today for one that may be older than the configuration's parts."""
    return _completed(saved, config) if "pattern" in saved else _facts(from_flat(**saved))


def from_flat(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_layers: int,
    ffn_dim: int = 0,
    norm: str = "rmsnorm",
    norm_epsilon: float = 1e-5,
    use_bias: bool = False,
    activation: str = "swiglu",
    positions: str = "rope",
    rope_theta: float = 10000.0,
    windows: tuple[int | None, ...] = (None,),
    use_qk_norm: bool = False,
    attention_softcap: float | None = None,
    moe_pattern: tuple[bool, ...] = (False,),
    num_dense_prefix: int = 0,
    max_length: int = 1,
    **rest: Any,
) -> ModelConfig:
    """A model out of the flat fields that checkpoints recorded before configurations had parts.

    Args:
        num_heads, num_kv_heads, head_dim, rope_theta, attention_softcap: of every attention.
        num_layers, max_length: as in `ModelConfig`.
        ffn_dim, activation: of every dense feed-forward; the activation also of experts.
        norm, norm_epsilon: kind and epsilon of the norms.
        use_bias: biases in projections, dense feed-forwards and LayerNorms.
        positions: "rope", "learned" or "none".
        windows: window of each layer of the pattern, repeated as often as needed.
        use_qk_norm: whether queries and keys are normalised, head by head.
        moe_pattern: whether each layer of the pattern is a mixture, repeated likewise.
        num_dense_prefix: dense layers before the pattern.
        rest: of the experts and of `ModelConfig`.
    """
    period = math.lcm(len(windows), len(moe_pattern))
    experts = _flat_experts(rest, activation)

    def layer(number: int, is_moe: bool) -> LayerConfig:
        attention = AttentionConfig(
            num_heads,
            num_kv_heads,
            head_dim,
            rotary=RotaryConfig(theta=rope_theta) if positions == "rope" else None,
            biases=("q", "k", "v", "o") if use_bias else (),
            qk_norm="head" if use_qk_norm else None,
            window=windows[number % len(windows)],
            softcap=attention_softcap,
        )
        dense = None if is_moe else FeedForwardConfig(ffn_dim, activation, use_bias)
        return LayerConfig(attention, experts if is_moe else dense)

    return ModelConfig(
        num_layers=num_layers,
        max_length=max_length,
        pattern=tuple(layer(i, moe_pattern[i % len(moe_pattern)]) for i in range(period)),
        prefix=tuple(layer(i, False) for i in range(num_dense_prefix)),
        norm=NormConfig(norm, norm_epsilon, use_bias and norm == "layernorm"),
        use_learned_positions=positions == "learned",
        **rest,
    )


def _flat_experts(rest: dict[str, Any], activation: str) -> ExpertsConfig | None:
    """Takes the flat fields of experts out of `rest`; None for a dense model."""
    names = {
        "num_experts": "num_experts",
        "num_active_experts": "num_active",
        "expert_dim": "dim",
        "balance_loss": "balance_loss",
        "router_z_loss": "z_loss",
        "expert_dropout": "dropout",
    }
    given = {new: rest.pop(old) for old, new in names.items() if old in rest}
    router = rest.pop("router", "gshard")
    drawn = {"threshold": "router_threshold", "mask": "router_mask"}
    drawn = {new: rest.pop(old) for new, old in drawn.items() if old in rest}
    gradient = rest.pop("router_expert_gradient", "paper")
    if not given.get("num_experts"):
        return None
    versions = {
        "sparsemixer": "v1",
        "sparsemixer_v2": "v2",
        "sparsemixer_v2_star": "v2_star",
    }
    routers = {
        "gshard": TopKRouter,
        "densemixer": DenseMixerRouter,
        "masked_sampling": lambda: MaskedSamplingRouter(**drawn),
    }
    if router in versions:
        version = versions[router]
        chosen = SparseMixerRouter(**drawn, version=version, expert_gradient=gradient)
    else:
        chosen = routers[router]()
    return ExpertsConfig(**given, activation=activation, router=chosen)
