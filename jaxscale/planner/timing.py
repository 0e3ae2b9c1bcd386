"""Seconds of blocks of a program: each distinct one runs once, forward and backward."""

import functools
import hashlib
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.ops.draws import scramble, uniform
from jaxscale.types import Array

NUM_TIMED = 3
NUM_CALLS = 4  # dispatched at once, so that a device never waits for a launch
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of a function in a program's text


class Seconds(NamedTuple):
    """Of a block's forward, and of its backward without it; infinite if it ran out of memory."""

    forward: float
    backward: float


class BlockTimes:
    """Seconds of blocks by the hash of their programs, which have shapes and types in them.

    Args:
        device: where they run.
    Attributes:
        num_blocks: that were asked for.
    """

    def __init__(self, device: jax.Device):
        self.device = device
        self.num_blocks = 0
        self._by_hash: dict[str, Seconds] = {}

    @property
    def num_measured(self) -> int:
        """Distinct ones."""
        return len(self._by_hash)

    def __call__(self, forward: Callable, *arguments: Any) -> Seconds:
        """Seconds of a block.

        Args:
            forward: of arrays in trees, returns arrays in a tree.
            arguments: shapes of what it takes; all that is floating gets a gradient.
        """
        self.num_blocks += 1
        program = ADDRESS.sub("", str(jax.make_jaxpr(forward)(*arguments)))
        key = hashlib.sha256(program.encode()).hexdigest()
        if key not in self._by_hash:
            self._by_hash[key] = self._run(forward, arguments)
        return self._by_hash[key]

    def _run(self, forward: Callable, arguments: Any) -> Seconds:
        try:
            with jax.default_device(self.device):
                values = drawn(arguments)
                alone = median_s(jax.jit(forward), *values)
                both = median_s(jax.jit(functools.partial(_gradient, forward)), *values)
        except jax.errors.JaxRuntimeError as error:
            # No plan may have such a block: running out of memory is never a cost.
            if OUT_OF_MEMORY not in str(error):
                raise
            return Seconds(math.inf, math.inf)
        return Seconds(alone, max(both - alone, 0.0))


def median_s(function: Callable, *values: Any) -> float:
    """Median seconds of a call."""
    jax.block_until_ready(function(*values))
    seconds = []
    for _ in range(NUM_TIMED):
        began = time.perf_counter()
        for _ in range(NUM_CALLS):
            found = function(*values)
        jax.block_until_ready(found)
        seconds.append((time.perf_counter() - began) / NUM_CALLS)
    return float(np.median(seconds))


def drawn(shapes: Any) -> Any:
    """Numbers from -0.1 to 0.1; integers are 0, which every table has a row for.

    A GPU that multiplies zeros draws less power and clocks higher.
    """
    leaves, structure = jax.tree.flatten(shapes)

    def draw() -> list[Array]:
        return [_draw(number, leaf) for number, leaf in enumerate(leaves)]

    return structure.unflatten(jax.jit(draw)())


def _draw(number: int, leaf: jax.ShapeDtypeStruct) -> Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    place = jnp.arange(math.prod(leaf.shape), dtype=jnp.uint32)
    words = scramble(jnp.zeros(2, jnp.uint32), place, number)[:, 0]
    return (0.2 * uniform(words) - 0.1).astype(leaf.dtype).reshape(leaf.shape)


def _gradient(forward: Callable, *values: Any) -> list[Array]:
    """The gradient of half the squares of all that a block makes, by all that enters it."""
    leaves, structure = jax.tree.flatten(values)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def of_floats(floats: list[Array]) -> list[Array]:
        rest = iter(floats)
        merged = [next(rest) if flag else leaf for flag, leaf in zip(is_float, leaves)]
        made = jax.tree.leaves(forward(*structure.unflatten(merged)))
        return [x for x in made if jnp.issubdtype(x.dtype, jnp.floating)]

    floats = [leaf for flag, leaf in zip(is_float, leaves) if flag]
    made, pull = jax.vjp(of_floats, floats)
    (gradient,) = pull(made)
    return gradient
