"""Weights by a family's plan: a source's tensors to our leaves, and our leaves to new tensors."""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.boxes import box_of
from jaxscale.checkpoint.safetensors import NewTensor
from jaxscale.checkpoint.source import LazyArray
from jaxscale.convert.places import Layout, Share, plan
from jaxscale.models.config import ModelConfig
from jaxscale.types import InputError, Params

# Rotary frequencies, causal masks and positions, which files of old versions hold; nothing reads
# them.
UNREAD = re.compile(
    r".*(\.rotary_emb\.inv_freq|\.attn\.(bias|masked_bias)|\.embeddings\.position_ids)"
)
UNEMBEDDING = "head/weights"


def import_params(
    config: ModelConfig,
    layout: Layout,
    leaves: Mapping[str, LazyArray],
    *,
    stored: Params,
    where: str,
) -> Params:
    """The parameters of a model out of a source.

    Args:
        config: the model.
        layout: of the family.
        leaves: the source's tensors by name.
        stored: the parameters as shapes with shardings, in the canonical order of the layers.
        where: the source, for messages.
    Returns:
        The tree, every element of which was read, placed as `stored` says. One tensor is in host
        memory at a time, besides leaves that lie on the host.
    Raises:
        InputError: a tensor is missing, unknown, of another shape or no float; it is named.
    """
    found = family_leaves(config, layout, leaves, where=where)

    def leaf(path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        return filled(target, found[path].shares, leaves)

    return tree.map_with_path(leaf, stored)


@dataclasses.dataclass(frozen=True)
class FamilyLeaf:
    """One of our leaves out of a family's tensors; a `LazyArray`. One tensor is read at a time.

    Args:
        shares: of the leaf, as `plan` has them.
        tensors: of the source by name.
    """

    shares: tuple[Share, ...]
    tensors: Mapping[str, LazyArray]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.shares[0].parameter.shape

    @property
    def dtype(self) -> np.dtype:
        """Its type, which holds every number of its tensors."""
        dtypes = [self.tensors[share.tensor].dtype for share in self.shares]
        return np.dtype(functools.reduce(jnp.promote_types, dtypes))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box."""
        corner, sizes = box_of(index, self.shape)
        box = tuple(map(slice, corner, map(operator.add, corner, sizes)))
        values = np.empty(sizes, self.dtype)
        for share in self.shares:
            numbers = share.index
            if all(number in range(part.start, part.stop) for number, part in zip(numbers, box)):
                whole = share.read(self.tensors[share.tensor][()])
                place = tuple(map(operator.sub, numbers, corner))
                values[place] = whole[box[len(numbers) :]]
        return values


def family_leaves(
    config: ModelConfig,
    layout: Layout,
    tensors: Mapping[str, LazyArray],
    *,
    where: str,
) -> dict[str, FamilyLeaf]:
    """Our leaves by path out of a family's tensors; nothing of them is read.

    Args:
        config: the model.
        layout: of the family.
        tensors: the source's, by name.
        where: the source, for messages.
    Raises:
        InputError: as `check_tensors`.
    """
    planned = plan(config, layout, tensors.keys())
    check_tensors(planned, tensors, where)
    shares: dict[str, list[Share]] = {}
    for parts in planned.values():
        for share in parts:
            shares.setdefault(share.leaf, []).append(share)
    return {path: FamilyLeaf(tuple(parts), tensors) for path, parts in shares.items()}


def check_tensors(
    tensors: dict[str, list[Share]],
    leaves: Mapping[str, LazyArray],
    where: str,
) -> None:
    """Raises InputError unless a source has exactly the tensors of a plan, in their shapes."""
    for name, shares in tensors.items():
        if name not in leaves:
            expected = f"a tensor for {shares[0].leaf}; the source lacks it"
            raise InputError(f"{where}: {name}", None, expected)
        shape, dtype = tuple(leaves[name].shape), leaves[name].dtype
        if shape != shares[0].tensor_shape:
            expected = f"{shares[0].tensor_shape} for {shares[0].leaf}"
            raise InputError(f"{where}: {name}", shape, expected)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(f"{where}: {name}", str(dtype), "floating-point numbers")
    for name in sorted(leaves.keys() - tensors.keys()):
        if not UNREAD.fullmatch(name):
            expected = "no such tensor: the model's config.json has no place for it"
            raise InputError(f"{where}: {name}", leaves[name].shape, expected)


def filled(
    target: jax.ShapeDtypeStruct,
    shares: Sequence[Share],
    leaves: Mapping[str, LazyArray],
) -> jax.Array:
    """A leaf of shares out of tensors by name, put together on its devices box by box."""
    first = shares[0]
    if not first.index:
        values = first.read(leaves[first.tensor][()]).astype(target.dtype, copy=False)
        return jax.device_put(values, target.sharding)
    leaf = jax.jit(
        functools.partial(jnp.full, target.shape, jnp.nan, target.dtype),
        out_shardings=target.sharding,
    )()
    # Donated, so that a stack is on its devices once and never whole on the host.
    put = jax.jit(_put, donate_argnums=0, out_shardings=target.sharding)

    def box(share: Share) -> np.ndarray:
        return share.read(leaves[share.tensor][()]).astype(target.dtype, copy=False)

    for share in shares:  # of whose boxes none lives on while the next is read
        leaf = put(leaf, box(share), np.array(share.index, np.int32))
    return leaf


def _put(leaf: jax.Array, box: jax.Array, index: jax.Array) -> jax.Array:
    return leaf.at[tuple(index)].set(box)


def export_tensors(
    config: ModelConfig,
    layout: Layout,
    params: Params,
    *,
    dtype: np.dtype,
) -> list[NewTensor]:
    """The tensors of a model as a family names them, in the form of transformers 4.

    Args:
        config: the model.
        layout: of the family.
        params: the parameter tree, in the canonical order of the layers.
        dtype: of the tensors.
    Returns:
        Tensors whose values are fetched one by one when they are written.
    """
    leaves = tree.flatten(params)

    def maker(shares: list[Share]) -> Callable[[], np.ndarray]:
        return lambda: assembled(shares, leaves, dtype)

    return [
        NewTensor(name, shares[0].tensor_shape, dtype, maker(shares))
        for name, shares in plan(config, layout).items()
    ]


def assembled(
    shares: list[Share],
    leaves: dict[str, Any],
    dtype: np.dtype,
) -> np.ndarray:
    """A tensor of shares of leaves by path."""
    tensor = np.zeros(shares[0].tensor_shape, dtype)
    for share in shares:
        box = np.asarray(leaves[share.leaf][share.index]).astype(dtype)
        share.write(box, tensor)
    return tensor
