"""What a family of Hugging Face is, and what the configurations of most have in common."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxscale.convert.fields import MISSING, Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import write_rotary
from jaxscale.models.config import (
    AttentionConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
    RotaryConfig,
    TopKRouter,
)
from jaxscale.types import InputError

HEAD = "lm_head"
EVERY_BIAS = ("q", "k", "v", "o")
GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
NAMES_OF_GATED = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        model_types: of config.json; what is written has the first.
        architecture: class of transformers.
        read: (fields, names of the tensors) -> the model; fields that it leaves are refused.
        write: the fields of a model of the family. Nothing is checked here: whoever writes them
            reads them again and compares.
        layout: of the tensors.
        has_score: whether transformers has it with a value head, "...ForSequenceClassification".
    """

    model_types: tuple[str, ...]
    architecture: str
    read: Callable[[Fields, Collection[str]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    layout: Layout
    has_score: bool = True


def read_around(fields: Fields, names: Collection[str]) -> dict[str, Any]:
    """The arguments of `ModelConfig` that are around the layers."""
    return {
        "vocab_size": fields.take("vocab_size", int),
        "num_layers": fields.count("num_hidden_layers"),
        "model_dim": fields.count("hidden_size"),
        "max_length": fields.take("max_position_embeddings", int),
        "is_tied": read_tied(fields, names),
    }


def write_around(config: ModelConfig) -> dict[str, Any]:
    """The fields that `read_around` takes."""
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.is_tied,
    }


def read_tied(fields: Fields, names: Collection[str]) -> bool:
    """Whether the unembedding is the embedding: what the file says, or else what there is.

    Files leave the field out where it has the default of a class, which is no help.
    """
    has_head = f"{HEAD}.weight" in names
    is_tied = fields.take("tie_word_embeddings", bool, not has_head)
    if is_tied and has_head:
        expected = f"false, or no tensor {HEAD}.weight; the two contradict each other"
        raise InputError(fields.place("tie_word_embeddings"), True, expected)
    return is_tied


def read_attention(
    fields: Fields,
    model_dim: int,
    **parts: Any,
) -> AttentionConfig:
    """Attention with the heads that the file gives; `parts` are its other arguments."""
    num_heads = fields.count("num_attention_heads")
    head_dim = fields.take("head_dim", int, 0)
    if not head_dim:
        head_dim, rest = divmod(model_dim, num_heads)
        if rest:
            expected = f"a divisor of hidden_size = {model_dim}, as there is no head_dim"
            raise InputError(fields.place("num_attention_heads"), num_heads, expected)
    num_kv_heads = fields.take("num_key_value_heads", int, num_heads)
    return AttentionConfig(num_heads, num_kv_heads, head_dim, **parts)


def write_attention(config: ModelConfig) -> dict[str, Any]:
    """The fields of heads and rotary positions of the first layer."""
    attention = config.layers[0].attention
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
    } | write_rotary(attention.rotary or RotaryConfig())


def read_windows(
    fields: Fields,
    num_layers: int,
    *,
    has_switch: bool = False,
    slides: Callable[[int], bool] = lambda number: True,
) -> list[int | None]:
    """The window of each layer.

    Args:
        fields: of the model.
        num_layers: L.
        has_switch: whether the family has `use_sliding_window` and `max_window_layers`, the number
            of layers before the first with a window.
        slides: which layers have a window where the file does not list `layer_types`.
    """
    window = fields.take("sliding_window", int | None, None)
    types = fields.take("layer_types", tuple, None)
    first = 0
    if has_switch:
        # What they leave open is a class's default, and the opposite of what the window says.
        if not fields.take("use_sliding_window", bool, MISSING if window else False):
            window = None
        is_needed = window is not None and types is None
        first = fields.take("max_window_layers", int, MISSING if is_needed else 0)
    by_rule = [
        window if number >= first and slides(number) else None for number in range(num_layers)
    ]
    if types is None:
        return by_rule
    known = all(each in (SLIDING, FULL) for each in types)
    if len(types) != num_layers or not known or (SLIDING in types and window is None):
        expected = f"{num_layers} of {SLIDING!r} and {FULL!r}, the former with a sliding_window"
        raise InputError(fields.place("layer_types"), types, expected)
    return [window if each == SLIDING else None for each in types]


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The fields of windows; layers that differ are listed."""
    windows = [layer.attention.window for layer in config.layers]
    given = {window for window in windows if window is not None}
    fields: dict[str, Any] = {"sliding_window": max(given, default=None)}
    if given and None in windows:
        fields["layer_types"] = [FULL if each is None else SLIDING for each in windows]
    return fields


def check_gates(fields: Fields, experts: ExpertsConfig) -> ExpertsConfig:
    """The experts; raises InputError for one active expert whose gate is divided by itself.

    That gate is 1, and no router learns from it; ours keeps it as it is.
    """
    is_divided = isinstance(experts.router, TopKRouter) and experts.router.is_renormalised
    if experts.num_active == 1 and is_divided:
        expected = "2 or more experts where gates are renormalised"
        raise InputError(fields.place("num_experts_per_tok"), 1, expected)
    return experts


def pattern_of(layers: Sequence[LayerConfig]) -> tuple[LayerConfig, ...]:
    """The shortest pattern whose repetition gives the layers."""
    num = len(layers)
    for period in range(1, num + 1):
        if num % period == 0 and list(layers[:period]) * (num // period) == list(layers):
            return tuple(layers[:period])
    raise InputError("num_hidden_layers", num, "at least one layer")
