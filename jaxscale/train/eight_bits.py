"""Moments of an optimizer at rest in 8 bits: floats with a scale for each row of a parameter.

A moment is rounded up or down by chance, so that on average it follows its gradients; rounded to
the nearest it would stand still, as a step moves it by less than the distance of two numbers.

Source: Dettmers et al. 2021, 8-bit optimizers (arXiv 2110.02861), whose blocks are rows here and
    whose table of values is the type float8_e4m3fn.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxscale import tree
from jaxscale.parallel.rules import mirror
from jaxscale.types import Array

EIGHT_BITS = jnp.float8_e4m3fn
FORMAT = jnp.finfo(EIGHT_BITS)
LARGEST = float(FORMAT.max)
LEAST_NORMAL, LEAST = float(FORMAT.smallest_normal), float(FORMAT.smallest_subnormal)
SECOND_MOMENT = "nu"  # optax's name of it; it rests as its root, whose range is half as wide
SEED = 8


class EightBitState(NamedTuple):
    """The state of an optimizer.

    Args:
        count: [] int32, updates so far.
        values: the optimizer's own state, its moments in 8 bits over their scales.
        scales: of each moment, [..., 1] for its [..., n], in float32; None for all else.
    """

    count: Array
    values: Any
    scales: Any


def in_eight_bits(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, whose moments rest in 8 bits between updates.

    Args:
        optimizer: of whose state each leaf that mirrors a parameter is a moment.
    """

    def init(params: Any) -> EightBitState:
        count = jnp.zeros((), jnp.int32)
        return _stored(count, optimizer.init(params), params)

    def update(gradients: Any, state: EightBitState, params: Any = None) -> tuple[Any, Any]:
        updates, moved = optimizer.update(gradients, _opened(state), params)
        return updates, _stored(state.count + 1, moved, gradients)

    return optax.GradientTransformation(init, update)


def _stored(count: Array, state: Any, params: Any) -> EightBitState:
    """An optimizer's state as it rests; what is drawn for rounding depends on `count`."""
    true = jax.tree.map(lambda _: True, params)
    is_moment = jax.tree.leaves(mirror(state, params, true, False))
    key = jax.random.fold_in(jax.random.key(SEED), count)
    values, scales = [], []
    for number, (path, leaf) in enumerate(tree.flatten(state).items()):
        scale = None
        if is_moment[number]:
            leaf_key = jax.random.fold_in(key, number)
            leaf, scale = encode(leaf, leaf_key, is_root=_is_second(path))
        values.append(leaf)
        scales.append(scale)
    structure = jax.tree.structure(state)
    return EightBitState(
        count,
        values=jax.tree.unflatten(structure, values),
        scales=jax.tree.unflatten(structure, scales),
    )


def _opened(state: EightBitState) -> Any:
    """The optimizer's state as its update takes it."""
    scales = tree.flatten(state.scales)

    def opened(path: str, leaf: Array) -> Array:
        if path not in scales:
            return leaf
        return decode(leaf, scales[path], is_root=_is_second(path))

    return tree.map_with_path(opened, state.values)


def _is_second(path: str) -> bool:
    return SECOND_MOMENT in path.split(tree.SEPARATOR)


def encode(
    moment: Array,
    key: Array,
    *,
    is_root: bool,
) -> tuple[Array, Array]:
    """A moment in 8 bits, rounded by chance, and its scales.

    Args:
        moment: [..., n].
        key: of what is drawn.
        is_root: whether its root is stored. No root above 0 is stored as 0, since an update is
            divided by it.
    Returns:
        (values [..., n] of 8 bits, scales [..., 1] in float32).
    """
    wide = moment.astype(jnp.float32)
    wide = jnp.sqrt(wide) if is_root else wide
    scale = jnp.abs(wide).max(-1, keepdims=True) / LARGEST
    x = _rounded_by_chance(wide / jnp.where(scale > 0, scale, 1), key)
    if is_root:
        x = jnp.where(wide > 0, jnp.maximum(x, LEAST), x)
    return jnp.clip(x, -LARGEST, LARGEST).astype(EIGHT_BITS), scale


def _rounded_by_chance(x: Array, key: Array) -> Array:
    """One of the two neighbours in 8 bits of each number, so that the expectation is the number."""
    # The distance to the next number, which is the same below the least normal one.
    _, exponent = jnp.frexp(jnp.maximum(jnp.abs(x), LEAST_NORMAL))
    step = jnp.ldexp(jnp.ones_like(x), exponent - 1 - FORMAT.nmant)
    chance = jax.random.bits(key, x.shape, jnp.uint8).astype(jnp.float32) / 256
    return jnp.floor(x / step + chance) * step


def decode(
    values: Array,
    scale: Array,
    *,
    is_root: bool,
) -> Array:
    """The moment [..., n] of which `encode` made the values, in float32."""
    wide = values.astype(jnp.float32) * scale
    return wide**2 if is_root else wide
