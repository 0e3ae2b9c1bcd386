"""How the tokens of a device are cut into chunks, and where the arrays of a chunk rest."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.types import Array


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Tokens cut into equal parts.

    Args:
        num: parts.
        num_members: of the tensor group. What the whole group knows of its tokens holds those of
            one member after the other, each cut alike.
    """

    num: int
    num_members: int = 1

    def own(self, x: Array, number: int) -> Array:
        """A part of x [B, own T, ...]."""
        size = x.shape[1] // self.num
        start = number * size
        return lax.slice_in_dim(x, start, start + size, axis=1)

    def write(
        self,
        x: Array,
        part: Array,
        number: int,
    ) -> Array:
        """`x` [B, own T, ...] with a part of it replaced, which XLA does in place."""
        start = number * part.shape[1]
        return lax.dynamic_update_slice_in_dim(x, part, start, axis=1)

    def known(self, tree: Any, number: int) -> Any:
        """The same part of all members of the group, of arrays [B, T, ...]; a number stays."""

        def one(x: Array) -> Array:
            if x.ndim == 0:
                return x
            num_rows, _, *rest = x.shape
            by_part = x.reshape(num_rows, self.num_members, self.num, -1, *rest)
            part = by_part[:, :, number]
            return part.reshape(num_rows, -1, *rest)

        return jax.tree.map(one, tree)

    def join(self, parts: list[Any]) -> Any:
        """The arrays [B, T, ...] of which `known` gives the parts."""

        def one(*parts: Array) -> Array:
            num_rows, _, *rest = parts[0].shape
            shape = num_rows, self.num_members, -1, *rest
            by_member = [x.reshape(shape) for x in parts]
            whole = jnp.concatenate(by_member, axis=2)
            return whole.reshape(num_rows, -1, *rest)

        return jax.tree.map(one, *parts)


def put(place: str, tree: Any) -> Any:
    """The arrays of a tree, at rest on the "device" or the "host" until `fetch`."""
    if place == "device":
        return tree
    return jax.device_put(tree, jax.memory.Space.Host)


def fetch(
    place: str,
    tree: Any,
    after: Any,
) -> tuple[Any, Any]:
    """The arrays of a tree, on the device, not before `after` has been computed.

    Else the compiler may begin every copy at once, and all chunks were on the device.

    Returns:
        (tree, after). Go on with this `after`: it must lead to a result. What leads nowhere the
        compiler takes out, and with it the order; then two copies of one array become one.
    """
    if place == "device":
        return tree, after
    tree, after = tied((tree, after))
    return jax.device_put(tree, jax.memory.Space.Device), after


def kept(place: str, tree: Any) -> Any:
    """The arrays that a layer's forward kept for its backward, on the device.

    Not tied as by `fetch`. Where layers are a loop, the copy takes them out of the array of all
    layers before any barrier, so that what is tied to them would wait for them. Each is asked for
    by a `tied` once it is needed, and the compiler begins its copy not long before.
    """
    return tree if place == "device" else jax.device_put(tree, jax.memory.Space.Device)


def tied(tree: Any) -> Any:
    """The arrays of a tree, none of which is used before all have been computed."""
    return lax.optimization_barrier(tree)
