"""Does a checkpoint hold what is asked for: the same model, the same leaves, the same shapes and dtypes?"""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxscale.types import InputError

MAX_NAMED = 3


def check_fingerprint(saved: dict, current: dict, defaults: dict, where: str) -> None:
    """Raises InputError naming the first fields in which a checkpoint's model differs from the present one.

    Args:
        saved: fields as the checkpoint has them; those that `current` lacks no longer matter.
        current: fields of the present model.
        defaults: what fields were before they existed.
        where: path of the checkpoint, for the message.
    """
    defaults, saved, current = (
        _flatten(json.loads(json.dumps(fields))) for fields in (defaults, saved, current)
    )
    saved = defaults | saved
    absent = "(absent)"
    differing = [name for name in current if saved.get(name, absent) != current[name]]
    if differing:
        facts = [f"{name}={saved.get(name, absent)!r}" for name in differing[:MAX_NAMED]]
        wanted = [f"{name}={current[name]!r}" for name in differing[:MAX_NAMED]]
        raise InputError(
            "checkpoint.directory",
            where,
            f"a checkpoint of this model with {', '.join(wanted)}; it is of another model with {', '.join(facts)}",
        )


def check_leaves(saved: Any, wanted: Any, where: str, *, is_cast_allowed: bool) -> None:
    """Raises InputError naming the first leaf of `wanted` that the checkpoint lacks or holds in another form.

    Args:
        saved: tree of array metadata as the checkpoint has it.
        wanted: tree of jax.ShapeDtypeStruct with shardings.
        where: path of the checkpoint, for the message.
        is_cast_allowed: whether dtypes may differ.
    """
    saved, wanted = (ocp.tree.to_flat_dict(tree, sep="/") for tree in (saved, wanted))
    if odd := sorted(set(saved) ^ set(wanted)):
        side = "the checkpoint lacks" if odd[0] in wanted else "only the checkpoint has"
        raise InputError(
            "checkpoint.directory", where, f"the leaves of this run's state; {side} {odd[0]}"
        )
    for name, leaf in wanted.items():
        given, expected = _form(saved[name]), _form(leaf)
        if given[0] != expected[0] or (given[1] != expected[1] and not is_cast_allowed):
            raise InputError(
                "checkpoint.directory",
                where,
                f"leaf {name} as {_describe(expected)}; it holds {_describe(given)}",
            )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: value}
    flat = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _form(leaf: Any) -> tuple[tuple[int, ...], str]:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # a key is stored as its words
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def _describe(form: tuple[tuple[int, ...], str]) -> str:
    return f"{form[1]}[{', '.join(map(str, form[0]))}]"
