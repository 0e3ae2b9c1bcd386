"""Triton kernels called from JAX: through jax-triton on a GPU, interpreted where there is none.

Triton and jax-triton are optional, so nothing here imports them before a kernel is called.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.resources
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax import Array

from jaxscale.kernels import device

# The releases whose interface this file knows, from the oldest on and before the first unknown one:
# jax-triton 0.4 renamed arguments and asks for Triton 3.7.
RELEASES = {"jax-triton": ("0.3.1", "0.4"), "triton": ("3.6", "3.7")}
# Where no GPU says otherwise, kernels are built for this one.
DEFAULT_CAPABILITY = "9.0"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a Triton kernel cuts its work; for attention rows are queries and columns are keys.

    Args:
        rows, columns: of the tile that one program computes.
        depth: elements of the contraction in one step; 0 where a kernel has no such loop.
        warps: of one program.
        stages: steps whose operands are in shared memory.
    """

    rows: int
    columns: int
    depth: int = 0
    warps: int = 8
    stages: int = 3


# A GPU with as little shared memory as any that these kernels run on: an RTX card or an L4.
SMALLEST = "8.6"
_tuned: dict[str, Blocks] = {}


def use_blocks(tuned: Mapping[str, Blocks]) -> None:
    """Has this process take these blocks, by operation, in place of the package's."""
    _tuned.clear()
    _tuned.update(tuned)


@contextlib.contextmanager
def on_trial(operation: str, blocks: Blocks) -> Iterator[None]:
    """Has what is traced inside take these blocks of the operation, and then those of before."""
    before = dict(_tuned)
    use_blocks(before | {operation: blocks})
    try:
        yield
    finally:
        use_blocks(before)


def operations() -> tuple[str, ...]:
    """All that have blocks."""
    return tuple(_table()[SMALLEST])


def blocks_of(operation: str) -> Blocks:
    """The blocks that an operation, such as "grouped_matmul.forward", takes on this device."""
    return _tuned.get(operation) or package_blocks(operation)


def package_blocks(operation: str) -> Blocks:
    """The package's blocks of an operation on this device, whatever this process takes.

    A device that is not in the package's table gets those of SMALLEST.
    """
    capability = device.compute_capability() or DEFAULT_CAPABILITY
    table = _table()
    return table.get(capability, table[SMALLEST])[operation]


@functools.cache
def _table() -> dict[str, dict[str, Blocks]]:
    """The package's blocks by compute capability and operation.

    Those of 9.0 were measured, but for the Evoformer's attention; the others are what fits the
    shared memory.
    """
    text = (importlib.resources.files("jaxscale.kernels") / "triton_blocks.json").read_text()
    return {
        capability: {name: Blocks(**fields) for name, fields in operations.items()}
        for capability, operations in json.loads(text).items()
    }


@functools.cache
def missing() -> str | None:
    """What Triton kernels lack here, as the text of an error; None where they can be built."""
    for package, (oldest, unknown) in RELEASES.items():
        wanted = f"{package} >= {oldest}, < {unknown} (pip install 'jaxscale[gpu-kernels]')"
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{wanted}, but it is not installed"
        if not _numbers(oldest) <= _numbers(found) < _numbers(unknown):
            return f"{wanted}, but it is {found}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 6, 0) of "3.6.0+cu13"; a part such as "0rc1" counts by the digits it begins with."""
    parts = re.match(r"[\d.]*", version).group().split(".")
    return tuple(int(part) for part in parts if part)


def call(
    kernel: Any,
    *operands: Array,
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    blocks: Blocks,
    zeroed: tuple[int, ...] = (),
    interpret: Any = False,
    **constants: Any,
) -> tuple[Array, ...]:
    """Runs a Triton kernel, whose arguments are operands, results and constants, in this order.

    Args:
        kernel: decorated with `triton.jit`.
        operands: arrays, of which the kernel gets pointers.
        out_type: of the results.
        grid: number of programs in each dim.
        blocks: whose warps and stages the kernel is compiled for.
        zeroed: numbers of the results that begin as zeros; the others begin as anything.
        interpret: what runs it on the host, of (kernel, out_type, zeroed, grid, constants,
            *operands); False compiles it for the GPU.
        constants: the kernel's `constexpr` arguments.
    """
    if interpret:
        run = functools.partial(interpret, kernel, out_type, zeroed, grid, constants)
        return tuple(jax.pure_callback(run, out_type, *operands, vmap_method="sequential"))
    import jax_triton

    capability = device.compute_capability() or DEFAULT_CAPABILITY

    # jax-triton has no rule for vmap.
    @jax.custom_batching.sequential_vmap
    def run(*operands: Array) -> list[Array]:
        return jax_triton.triton_call(
            *operands,
            kernel=kernel,
            out_shape=out_type,
            grid=grid,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            zeroed_outputs=zeroed,
            compute_capability=math.floor(float(capability) * 10 + 0.5),
            **constants,
        )

    return tuple(run(*operands))
