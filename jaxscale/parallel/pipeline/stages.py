"""Which periods of the layer stack each pipeline stage holds, and the map between that order and the canonical one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.types import Array, InputError, check_positive

PADDING = -1


@dataclasses.dataclass(frozen=True)
class StageLayout:
    """How S stages with V chunks each store a stack of periods along dim 0 of its leaves.

    Canonical order is that of the layers. Chunk v of stage s is virtual stage k = v S + s and holds
    the k-th group of consecutive periods. A run stores stage after stage, each stage its chunks v =
    0 ... V - 1, each chunk padded to
    the longest: dim 0 has S V `num_slots` rows, of which sharding over `pipeline` gives each stage
    its own.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.2, for the assignment to chunks.
    Args:
        num_periods: periods of the stack.
        num_stages: S.
        num_chunks: V.
        stage_periods: periods of each virtual stage, in the order of the layers; None is as even as
            possible with the later ones smaller, because the last also holds the head.
    Raises:
        InputError: `stage_periods` has not V S numbers, one is below 1, or they do not sum to
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
        """Number of virtual stages, S V."""
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
        """Canonical period in each stored row, int [S V num_slots]; PADDING where there is none."""
        by_virtual = np.full((self.num_virtual, self.num_slots), PADDING)
        for virtual, (size, end) in enumerate(zip(self.sizes, np.cumsum(self.sizes), strict=True)):
            by_virtual[virtual, :size] = np.arange(end - size, end)
        return (
            by_virtual.reshape(self.num_chunks, self.num_stages, self.num_slots)
            .swapaxes(0, 1)
            .reshape(-1)
        )

    @property
    def is_identity(self) -> bool:
        """Whether a run stores the stack in canonical order, without padding."""
        return np.array_equal(self.order, np.arange(self.num_periods))

    @property
    def number(self) -> np.ndarray:
        """Int [S, V, num_slots]: the canonical number of each period, PADDING where there is none."""
        return self.order.reshape(self.num_stages, self.num_chunks, self.num_slots)

    @property
    def is_real(self) -> np.ndarray:
        """Bool [S, V, num_slots]: false for padding."""
        return self.number != PADDING

    def from_canonical(self, leaf: Array) -> Array:
        """[num_periods, ...] to the stored [S V num_slots, ...]; padding is zero."""
        self._check_rows(leaf, self.num_periods)
        if self.is_identity:
            return leaf
        rows = np.where(
            self.order == PADDING, self.num_periods, self.order
        )  # past the end, hence filled
        return jnp.take(leaf, rows, axis=0, mode="fill", fill_value=0)

    def to_canonical(self, leaf: Array) -> Array:
        """The stored [S V num_slots, ...] to [num_periods, ...]; padding is dropped."""
        self._check_rows(leaf, len(self.order))
        if self.is_identity:
            return leaf
        rows = np.argsort(self.order, stable=True)[-self.num_periods :]  # padding sorts first
        return jnp.take(leaf, rows, axis=0, unique_indices=True)

    def store(self, tree: Any, dims: Any) -> Any:
        """`from_canonical` on every layer stack of a tree: the leaves whose dim letters begin with "L"."""
        return jax.tree.map(
            lambda leaf, d: self.from_canonical(leaf) if d.startswith("L") else leaf, tree, dims
        )

    def restore(self, tree: Any, dims: Any) -> Any:
        """`to_canonical` on every layer stack of a tree."""
        return jax.tree.map(
            lambda leaf, d: self.to_canonical(leaf) if d.startswith("L") else leaf, tree, dims
        )

    def _check_rows(self, leaf: Array, num: int) -> None:
        if leaf.shape[:1] != (num,):
            raise ValueError(f"a leaf of {self} needs {num} rows, not shape {leaf.shape}")

    def _fewer(self) -> str:
        """What to give instead of too many virtual stages."""
        equation = (
            f"pipeline * num_chunks <= periods of the stack, but {self.num_stages} * {self.num_chunks} = "
            f"{self.num_virtual} > {self.num_periods}"
        )
        stages, chunks = self.num_periods // self.num_chunks, self.num_periods // self.num_stages
        nearest = [f"pipeline = {stages}"] * (stages > 0) + [f"num_chunks = {chunks}"] * (
            0 < chunks < self.num_chunks
        )
        return f"{equation}; nearest: {' or '.join(nearest) or 'pipeline = 1 with num_chunks = 1'}"

    def _check_stage_periods(self, sizes: tuple[int, ...]) -> None:
        nearest = f"; nearest: {_nearest(sizes, self.num_periods, self.num_virtual)}"
        if len(sizes) != self.num_virtual:
            equation = f"pipeline * num_chunks = {self.num_stages} * {self.num_chunks} = {self.num_virtual} numbers"
            raise InputError(
                "MeshConfig.stage_periods", sizes, f"{equation}, here {len(sizes)}{nearest}"
            )
        if min(sizes) < 1:
            raise InputError(
                "MeshConfig.stage_periods", sizes, f"at least 1 period in each chunk{nearest}"
            )
        if sum(sizes) != self.num_periods:
            equation = f"a sum of {self.num_periods} periods, but {' + '.join(map(str, sizes))} = {sum(sizes)}"
            raise InputError("MeshConfig.stage_periods", sizes, equation + nearest)


def canonical_shapes(stored: Any, dims: Any, layout: StageLayout) -> Any:
    """Shapes and shardings of a tree as it is on disk; stacks that do not divide over the stages are whole on each.

    Args:
        stored: shapes with shardings of the run's tree.
        dims: its dim letters; the leaves of layer stacks begin with "L".
        layout: of the run.
    """
    if layout.is_identity:
        return stored

    def one(leaf: jax.ShapeDtypeStruct, letters: str) -> jax.ShapeDtypeStruct:
        if not letters.startswith("L"):
            return leaf
        spec = leaf.sharding.spec
        if layout.num_periods % layout.num_stages:
            spec = PartitionSpec(None, *spec[1:])
        sharding = NamedSharding(leaf.sharding.mesh, spec, memory_kind=leaf.sharding.memory_kind)
        return jax.ShapeDtypeStruct(
            (layout.num_periods, *leaf.shape[1:]), leaf.dtype, sharding=sharding
        )

    return jax.tree.map(one, stored, dims)


def to_canonical(tree: Any, stored: Any, dims: Any, layout: StageLayout) -> Any:
    """A run's tree as it is on disk; arguments as `canonical_shapes`."""
    if layout.is_identity:
        return tree
    shardings = jax.tree.map(lambda leaf: leaf.sharding, canonical_shapes(stored, dims, layout))
    return jax.jit(lambda tree: layout.restore(tree, dims), out_shardings=shardings)(tree)


def from_canonical(tree: Any, stored: Any, dims: Any, layout: StageLayout) -> Any:
    """A tree from disk as a run stores it; arguments as `canonical_shapes`."""
    if layout.is_identity:
        return tree
    shardings = jax.tree.map(lambda leaf: leaf.sharding, stored)
    return jax.jit(lambda tree: layout.store(tree, dims), out_shardings=shardings)(tree)


def _even(num_periods: int, num_parts: int) -> tuple[int, ...]:
    each, more = divmod(num_periods, num_parts)
    return (each + 1,) * more + (each,) * (num_parts - more)


def _nearest(sizes: tuple[int, ...], num_periods: int, num_parts: int) -> tuple[int, ...]:
    """Sizes that work, changed as little as possible: the smallest grow or the largest shrink, one by one."""
    if len(sizes) != num_parts:
        return _even(num_periods, num_parts)
    found = [max(size, 1) for size in sizes]
    while sum(found) != num_periods:
        if sum(found) < num_periods:
            found[found.index(min(found))] += 1
        else:
            found[found.index(max(found))] -= 1
    return tuple(found)
