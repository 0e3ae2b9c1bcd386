"""Rotary positions in a config.json: the fields of transformers 4 and those of 5.

Version 4 has `rope_theta`, `partial_rotary_factor` and `rope_scaling`; version 5 has them all in
`rope_parameters`. A file with both forms must say the same in both.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxscale.convert.fields import Fields
from jaxscale.models.config import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RotaryConfig,
    YarnScaling,
)
from jaxscale.types import InputError, one_of

Numbers = tuple[float, ...]
Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling
Reader = Callable[[Fields, int], Scaling]
# What version 4 has beside `rope_scaling`, at the top.
AROUND = {
    "rope_theta": float,
    "partial_rotary_factor": float,
    "original_max_position_embeddings": int,
}


def _entries(fields: Fields) -> dict[str, Any]:
    """The entries of `rope_parameters`, however the file has them."""
    entries = dict(fields.take("rope_parameters", dict, {}))
    older = dict(fields.take("rope_scaling", dict, {}))
    for name, kind in AROUND.items():
        value = fields.take(name, kind, None)
        if value is not None:
            _add(older, name, value, fields)
    for found in (entries, older):
        if "type" in found:
            _add(found, "rope_type", found.pop("type"), fields)
    for name, value in older.items():
        _add(entries, name, value, fields)
    return {name: value for name, value in entries.items() if value is not None}


def _add(entries: dict[str, Any], name: str, value: Any, fields: Fields) -> None:
    if entries.setdefault(name, value) != value:
        expected = f"{value!r}, as another field of the file says"
        raise InputError(fields.place(name), entries[name], expected)


def _linear(given: Fields, max_length: int) -> LinearScaling:
    return LinearScaling(given.take("factor", float))


def _llama3(given: Fields, max_length: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=given.take("factor", float),
        low_frequency_factor=given.take("low_freq_factor", float),
        high_frequency_factor=given.take("high_freq_factor", float),
        original_length=given.take("original_max_position_embeddings", int),
    )


def _yarn(given: Fields, max_length: int) -> YarnScaling:
    return YarnScaling(
        factor=given.take("factor", float),
        original_length=given.take("original_max_position_embeddings", int),
        beta_fast=given.take("beta_fast", float, 32.0),  # 32 and 1 are the paper's
        beta_slow=given.take("beta_slow", float, 1.0),
        attention_factor=given.take("attention_factor", float, None),
    )


def _longrope(given: Fields, max_length: int) -> LongRopeScaling:
    original = given.take("original_max_position_embeddings", int)
    if original < 2:
        expected = "at least 2, as magnitudes follow from its logarithm"
        raise InputError(given.place("original_max_position_embeddings"), original, expected)
    ratio = max_length / original
    factor = given.take("factor", float, ratio)
    if factor != ratio:  # transformers 4 goes by the ratio, 5 by the field
        expected = f"max_position_embeddings / original_max_position_embeddings = {ratio}"
        raise InputError(given.place("factor"), factor, expected)
    magnitude = given.take("attention_factor", float, _magnitude(factor, original))
    return LongRopeScaling(
        factors=given.take("short_factor", Numbers),
        magnitude=magnitude,
        long_factors=given.take("long_factor", Numbers),
        long_magnitude=magnitude,
        original_length=original,
    )


def _longrope_with_magnitudes(given: Fields, max_length: int) -> LongRopeScaling:
    short, long = (given.take(f"{kind}_mscale", float) for kind in ("short", "long"))
    scaling = _longrope(given, max_length)
    return dataclasses.replace(scaling, magnitude=short, long_magnitude=long)


def _magnitude(factor: float, original: int) -> float:
    """Source: LongRoPE as released with Phi-3."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


PLAIN: dict[str, Reader] = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
# Its name in the first files of Phi-3 is "su".
LONGROPE: dict[str, Reader] = {"longrope": _longrope, "su": _longrope}
LONGROPE_WITH_MAGNITUDES: dict[str, Reader] = dict.fromkeys(LONGROPE, _longrope_with_magnitudes)


def read_rotary(
    fields: Fields,
    *,
    max_length: int,
    theta: float | None = None,
    is_partial: bool = False,
    scalings: Mapping[str, Reader] | None = None,
) -> RotaryConfig:
    """The rotary positions of a model.

    Args:
        fields: of its config.json; those of rotary positions are taken.
        max_length: `max_position_embeddings`.
        theta: what it means that the file has no `rope_theta`; None requires it.
        is_partial: whether the family can rotate a share of each head.
        scalings: readers of the scalings that the family has; None for PLAIN.
    Raises:
        InputError: a field is missing, unknown or contradicts another.
    """
    readers = PLAIN if scalings is None else scalings
    given = Fields(_entries(fields), fields.place("rope_parameters"))
    absent = {} if theta is None else {"absent": theta}
    theta = given.take("rope_theta", float, **absent)
    fraction = given.take("partial_rotary_factor", float, 1.0)
    if fraction != 1 and not is_partial:
        raise InputError(given.place("partial_rotary_factor"), fraction, "1, or no such field")
    kind = given.take("rope_type", str, "default")
    if kind == "default":
        given.take("original_max_position_embeddings", int, None)  # says nothing without a scaling
        scaling = None
    elif kind in readers:
        scaling = readers[kind](given, max_length)
    else:
        raise InputError(given.place("rope_type"), kind, one_of(kind, {"default", *readers}))
    given.finish()
    return RotaryConfig(theta, fraction, scaling)


def write_rotary(rotary: RotaryConfig) -> dict[str, Any]:
    """The fields of version 4, which version 5 reads too."""
    fields: dict[str, Any] = {"rope_theta": rotary.theta, "rope_scaling": None}
    if rotary.fraction != 1:
        fields["partial_rotary_factor"] = rotary.fraction
    match rotary.scaling:
        case LinearScaling(factor=factor):
            fields["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            fields["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        case YarnScaling() as scaling:
            fields["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
            }
            if scaling.attention_factor is not None:
                fields["rope_scaling"]["attention_factor"] = scaling.attention_factor
        case LongRopeScaling() as scaling:
            fields |= _write_longrope(scaling)
    return fields


def _write_longrope(scaling: LongRopeScaling) -> dict[str, Any]:
    written: dict[str, Any] = {
        "type": "longrope",
        "short_factor": list(scaling.factors),
        "long_factor": list(scaling.long_factors),
    }
    original = scaling.original_length
    return {"rope_scaling": written, "original_max_position_embeddings": original}


def write_magnitudes(rotary: RotaryConfig) -> dict[str, Any]:
    """The fields of PhiMoE, whose LongRoPE has its magnitudes and original length beside it."""
    fields = write_rotary(rotary)
    scaling = rotary.scaling
    if isinstance(scaling, LongRopeScaling):
        fields["rope_scaling"] |= {
            "short_mscale": scaling.magnitude,
            "long_mscale": scaling.long_magnitude,
            "original_max_position_embeddings": scaling.original_length,
        }
    return fields
