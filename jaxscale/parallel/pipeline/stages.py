"""Which periods of the layer stack each pipeline stage holds, in a run and on disk."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.types import Array, InputError, check_positive

PADDING = -1


@dataclasses.dataclass(frozen=True)
class StageLayout:
    """How pipeline stages store a stack of periods along dim 0 of its leaves.

    On disk the periods are in canonical order, that of the layers. A run has p stages with v chunks
    each. Chunk c of stage s is virtual stage c p + s and holds the group of consecutive periods of
    that number. A run stores stage after stage, and of each stage chunk after chunk. Each chunk is
    padded to the longest: dim 0 has p v `num_slots` rows, of which sharding over `pipeline` gives
    each stage its share.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.2, for the assignment to chunks.
    Args:
        num_periods: periods of the stack.
        num_stages: p.
        num_chunks: v.
        stage_periods: periods of each virtual stage, in the order of the layers; None is as even as
            possible with the later ones smaller.
    Raises:
        InputError: `stage_periods` has not p v numbers, one is below 1, or they do not sum to
            `num_periods`; or there are fewer periods than virtual stages.
    """

    num_periods: int
    num_stages: int
    num_chunks: int = 1
    stage_periods: tuple[int, ...] | None = None

    def __post_init__(self):
        check_positive("MeshConfig.pipeline", self.num_stages)
        check_positive("MeshConfig.num_chunks", self.num_chunks)
        if self.num_periods < self.num_virtual:
            raise InputError("MeshConfig.pipeline", self.num_stages, self._fewer())
        if self.stage_periods is not None:
            self._check_stage_periods(self.stage_periods)

    @property
    def num_virtual(self) -> int:
        """Number of virtual stages, p v."""
        return self.num_stages * self.num_chunks

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Periods of each virtual stage, in the order of the layers."""
        return self.stage_periods or _even(self.num_periods, self.num_virtual)

    @property
    def num_slots(self) -> int:
        """Periods of a chunk after padding."""
        return max(self.sizes)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Canonical period in each stored row, int [p v num_slots]; PADDING where there is none."""
        by_virtual = np.full((self.num_virtual, self.num_slots), PADDING)
        first = 0
        for virtual, size in enumerate(self.sizes):
            by_virtual[virtual, :size] = np.arange(first, first + size)
            first += size
        by_chunk = by_virtual.reshape(self.num_chunks, self.num_stages, self.num_slots)
        by_stage = by_chunk.swapaxes(0, 1)
        return by_stage.reshape(-1)

    @property
    def is_identity(self) -> bool:
        """Whether a run stores the stack in canonical order, without padding."""
        return np.array_equal(self.order, np.arange(self.num_periods))

    @property
    def number(self) -> np.ndarray:
        """`order` as int [p, v, num_slots]."""
        return self.order.reshape(self.num_stages, self.num_chunks, self.num_slots)

    @property
    def is_real(self) -> np.ndarray:
        """Bool [p, v, num_slots]: false for padding."""
        return self.number != PADDING

    def from_canonical(self, leaf: Array) -> Array:
        """[num_periods, ...] to the stored [p v num_slots, ...]; padding is zero."""
        if self.is_identity:
            return leaf
        self._check_rows(leaf, self.num_periods)
        # Padding asks for a row past the end, which `take` fills.
        rows = np.where(self.order == PADDING, self.num_periods, self.order)
        return jnp.take(leaf, rows, axis=0, mode="fill", fill_value=0)

    def to_canonical(self, leaf: Array) -> Array:
        """The stored [p v num_slots, ...] to [num_periods, ...]; padding is dropped."""
        if self.is_identity:
            return leaf
        self._check_rows(leaf, len(self.order))
        rows = np.argsort(self.order, stable=True)
        rows = rows[-self.num_periods :]  # padding sorts first
        return jnp.take(leaf, rows, axis=0, unique_indices=True)

    def store(self, tree: Any, dims: Any) -> Any:
        """`from_canonical` on every layer stack of a tree.

        Args:
            tree: such as the parameters.
            dims: its dim letters; those of the leaves of layer stacks begin with "L".
        """
        return _map_stacks(self.from_canonical, tree, dims)

    def restore(self, tree: Any, dims: Any) -> Any:
        """`to_canonical` on every layer stack of a tree; arguments as `store`."""
        return _map_stacks(self.to_canonical, tree, dims)

    def _check_rows(self, leaf: Array, num: int) -> None:
        if leaf.shape[:1] != (num,):
            raise ValueError(f"a leaf of {self} needs {num} rows, not shape {leaf.shape}")

    def _fewer(self) -> str:
        """What to give instead of too many virtual stages."""
        product = f"{self.num_stages} * {self.num_chunks} = {self.num_virtual}"
        equation = "pipeline * num_chunks <= periods of the stack"
        fewer_stages = self.num_periods // self.num_chunks
        fewer_chunks = self.num_periods // self.num_stages
        nearest = []
        if fewer_stages > 0:
            nearest.append(f"pipeline = {fewer_stages}")
        if 0 < fewer_chunks < self.num_chunks:
            nearest.append(f"num_chunks = {fewer_chunks}")
        nearest_text = " or ".join(nearest) or "pipeline = 1 with num_chunks = 1"
        return f"{equation}, but {product} > {self.num_periods}; nearest: {nearest_text}"

    def _check_stage_periods(self, sizes: tuple[int, ...]) -> None:
        total = sum(sizes)
        if len(sizes) != self.num_virtual:
            product = f"{self.num_stages} * {self.num_chunks} = {self.num_virtual}"
            expected = f"pipeline * num_chunks = {product} numbers, here {len(sizes)}"
        elif min(sizes) < 1:
            expected = "at least 1 period in each chunk"
        elif total != self.num_periods:
            terms = " + ".join(map(str, sizes))
            expected = f"a sum of {self.num_periods} periods, but {terms} = {total}"
        else:
            return
        nearest = _nearest(sizes, self.num_periods, self.num_virtual)
        raise InputError("MeshConfig.stage_periods", sizes, f"{expected}; nearest: {nearest}")


def _map_stacks(change: Callable[[Array], Array], tree: Any, dims: Any) -> Any:
    """Changes every leaf whose dim letters begin with "L"."""

    def one(leaf: Any, letters: str) -> Any:
        return change(leaf) if letters.startswith("L") else leaf

    return jax.tree.map(one, tree, dims)


def canonical_shapes(stored: Any, dims: Any, layout: StageLayout) -> Any:
    """Shapes and shardings of a tree as it is on disk.

    A stack whose periods do not divide over the stages lies whole on each.

    Args:
        stored: shapes with shardings of the run's tree.
        dims: its dim letters; those of the leaves of layer stacks begin with "L".
        layout: of the run.
    """
    if layout.is_identity:
        return stored

    def canonical(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        old = leaf.sharding
        spec = old.spec
        if layout.num_periods % layout.num_stages:
            spec = PartitionSpec(None, *spec[1:])
        sharding = NamedSharding(old.mesh, spec, memory_kind=old.memory_kind)
        shape = (layout.num_periods, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return _map_stacks(canonical, stored, dims)


def to_canonical(tree: Any, stored: Any, dims: Any, layout: StageLayout) -> Any:
    """A run's tree as it is on disk; arguments as `canonical_shapes`."""
    if layout.is_identity:
        return tree
    wanted = _shardings(canonical_shapes(stored, dims, layout))
    return _converted(StageLayout.to_canonical, tree, dims, layout, wanted)


def from_canonical(
    tree: Any,
    stored: Any,
    dims: Any,
    layout: StageLayout,
) -> Any:
    """A tree from disk as a run stores it; arguments as `canonical_shapes`."""
    if layout.is_identity:
        return tree
    return _converted(StageLayout.from_canonical, tree, dims, layout, _shardings(stored))


def _converted(
    change: Callable[[StageLayout, Array], Array],
    tree: Any,
    dims: Any,
    layout: StageLayout,
    shardings: Any,
) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    letters, placed = map(structure.flatten_up_to, (dims, shardings))
    program = _program(change, layout, tuple(letters), tuple(placed))
    return structure.unflatten(program(leaves))


@functools.lru_cache(maxsize=64)
def _program(
    change: Callable[[StageLayout, Array], Array],
    layout: StageLayout,
    dims: tuple[str, ...],
    shardings: tuple[NamedSharding, ...],
) -> Callable[[list[Array]], list[Array]]:
    """Changes the leaves of layer stacks; compiled once, as every save waits for it."""

    def convert(leaves: list[Array]) -> list[Array]:
        return _map_stacks(functools.partial(change, layout), leaves, list(dims))

    return jax.jit(convert, out_shardings=list(shardings))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _even(num_periods: int, num_parts: int) -> tuple[int, ...]:
    """Sizes that differ by at most 1, the larger ones first."""
    each, more = divmod(num_periods, num_parts)
    return (each + 1,) * more + (each,) * (num_parts - more)


def _nearest(
    sizes: tuple[int, ...],
    num_periods: int,
    num_parts: int,
) -> tuple[int, ...]:
    """Sizes that work, changed little: the smallest grow or the largest shrink, one by one."""
    if len(sizes) != num_parts:
        return _even(num_periods, num_parts)
    found = [max(size, 1) for size in sizes]
    while sum(found) < num_periods:
        smallest = found.index(min(found))
        found[smallest] += 1
    while sum(found) > num_periods:
        largest = found.index(max(found))
        found[largest] -= 1
    return tuple(found)
