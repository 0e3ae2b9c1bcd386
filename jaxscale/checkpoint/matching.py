"""Whether a checkpoint holds what is asked for: the same model, leaves, shapes and dtypes."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxscale.types import InputError

MAX_NAMED = 3
ABSENT = "(absent)"


def check_fingerprint(saved: dict, current: dict, where: str) -> None:
    """Checks that a checkpoint is of the present model.

    Args:
        saved: fields as the checkpoint has them; those that `current` lacks no longer matter.
        current: fields of the present model.
        where: path of the checkpoint, for the message.

    Raises:
        InputError: fields differ; names the first of them.
    """
    found = _flat_fields(saved)
    wanted = _flat_fields(current)
    differing = [name for name in wanted if found.get(name, ABSENT) != wanted[name]]
    if differing:
        named = differing[:MAX_NAMED]
        right = ", ".join(f"{name}={wanted[name]!r}" for name in named)
        wrong = ", ".join(f"{name}={found.get(name, ABSENT)!r}" for name in named)
        raise InputError(
            "checkpoint.directory",
            where,
            f"a checkpoint of this model with {right}; it is of another model with {wrong}",
        )


def check_leaves(saved: Any, wanted: Any, where: str, *, is_cast_allowed: bool) -> None:
    """Checks that a checkpoint has exactly the leaves that are wanted, in their shapes.

    Args:
        saved: tree of array metadata as the checkpoint has it.
        wanted: tree of jax.ShapeDtypeStruct with shardings.
        where: path of the checkpoint, for the message.
        is_cast_allowed: whether dtypes may differ; else only by a wider type, which holds every
            number of the saved one.

    Raises:
        InputError: a leaf is missing, not wanted or of another form; names the first.
    """
    saved = ocp.tree.to_flat_dict(saved, sep="/")
    wanted = ocp.tree.to_flat_dict(wanted, sep="/")
    unmatched = sorted(set(saved) ^ set(wanted))
    if unmatched:
        name = unmatched[0]
        side = "the checkpoint lacks" if name in wanted else "only the checkpoint has"
        expected = f"the leaves of this run's state; {side} {name}"
        raise InputError("checkpoint.directory", where, expected)
    for name, leaf in wanted.items():
        saved_shape, saved_dtype = _form(saved[name])
        shape, dtype = _form(leaf)
        is_right_dtype = is_cast_allowed or saved_dtype == dtype or _widens(saved_dtype, dtype)
        if saved_shape != shape or not is_right_dtype:
            right = _describe(shape, dtype)
            wrong = _describe(saved_shape, saved_dtype)
            expected = f"leaf {name} as {right}; it holds {wrong}"
            raise InputError("checkpoint.directory", where, expected)


def _flat_fields(fields: dict) -> dict[str, Any]:
    """The fields by dotted name, with the values that a checkpoint's JSON would have."""
    return _flatten(json.loads(json.dumps(fields)))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: value}
    flat = {}
    for key, item in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat.update(_flatten(item, name))
    return flat


def _form(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and name of the dtype."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # a key is stored as its words
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def _widens(saved: str, wanted: str) -> bool:
    """Whether a floating-point type holds every number of the saved one."""
    is_float = all(jnp.issubdtype(name, jnp.floating) for name in (saved, wanted))
    return is_float and jnp.promote_types(saved, wanted) == wanted


def _describe(shape: tuple[int, ...], dtype: str) -> str:
    sizes = ", ".join(str(size) for size in shape)
    return f"{dtype}[{sizes}]"
