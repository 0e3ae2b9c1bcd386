"""Loops over layers: with every iteration written out, or with caches in the carry."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.types import Array


def unrolled(
    body: Callable,
    carry: Any,
    inputs: tuple,
) -> tuple[Any, Any]:
    """`lax.scan(body, carry, inputs)` with every iteration written out.

    Args:
        body: (carry, inputs of one iteration) -> (carry, (caches, others)).
        carry: the first one.
        inputs: (params, caches, *others) with a leading dim of iterations; params and caches may be
            tuples of the iterations' parts.
    Returns:
        (the last carry, (caches as they were given, others stacked)).
    """
    params, caches, *others = inputs
    are_caches_apart = isinstance(caches, tuple)
    parts = params if isinstance(params, tuple) else _unstack(params)
    num = len(parts)
    cache_parts = caches if are_caches_apart else _unstack_plain(caches, num)
    other_parts = _unstack_plain(others, num)
    new_caches = []
    outputs = []
    for own, cache, other in zip(parts, cache_parts, other_parts, strict=True):
        carry, (new, output) = body(carry, (own, cache, *other))
        new_caches.append(new)
        outputs.append(output)
    joined = tuple(new_caches) if are_caches_apart else _stacked(new_caches)
    return carry, (joined, _stacked(outputs))


def scanned_with_caches(
    body: Callable,
    x: Any,
    params: Any,
    caches: Any,
    others: Any,
) -> tuple[Any, Any, Any]:
    """`lax.scan` over layers with their caches in the carry, which XLA updates in place.

    As inputs and outputs of the loop they would be copied twice.

    Args:
        body: (x, (params, caches, others) of one iteration) -> (x, (caches, outputs)).
        x: the first carry.
        params, caches, others: trees with a leading dim of iterations.
    Returns:
        (the last x, caches, outputs stacked).
    """

    def step(carry: tuple[Any, Any], inputs: tuple[Any, Any, Array]) -> tuple:
        x, caches = carry
        params, here, row = inputs

        def take(leaf: Array) -> Array:
            return lax.dynamic_index_in_dim(leaf, row, 0, keepdims=False)

        def put(leaf: Array, new: Array) -> Array:
            return lax.dynamic_update_index_in_dim(leaf, new, row, 0)

        own = jax.tree.map(take, caches)
        x, (own, outputs) = body(x, (params, own, here))
        caches = jax.tree.map(put, caches, own)
        return (x, caches), outputs

    num = len(jax.tree.leaves(caches)[0])
    inputs = (params, others, jnp.arange(num))
    (x, caches), outputs = lax.scan(step, (x, caches), inputs)
    return x, caches, outputs


def periods_of(tree: Any) -> list[Any]:
    """The parts of a tree whose leaves have a leading dim of periods."""
    return _unstack_plain(tree, jax.tree.leaves(tree)[0].shape[0])


def _stacked(trees: list[Any]) -> Any:
    """One tree of the iterations' trees, with a leading dim of iterations."""

    def stack(*leaves: Array) -> Array:
        return jnp.stack(leaves)

    return jax.tree.map(stack, *trees)


def _unstack_plain(tree: Any, num: int) -> list[Any]:
    return [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(num)]  # noqa: B023


@jax.custom_vjp
def _unstack(tree: Any) -> list[Any]:
    """Splits the leading dim of every leaf.

    Its gradient is one stack, where that of slicing would be a sum of L padded gradients.
    """
    return periods_of(tree)


def _unstack_backward(_: None, cotangents: list[Any]) -> tuple[Any]:
    return (jax.tree.map(_stack, *cotangents),)


_unstack.defvjp(lambda tree: (_unstack(tree), None), _unstack_backward)


def _stack(*leaves: Array) -> Array:
    """`jnp.stack(leaves)`, each copied as soon as the backward has made it, the last layer first.

    XLA would fuse `jnp.stack` with what reads it, the norm and the update. Such kernels run at a
    third to two thirds of an H200's memory rate, while these copies run beside the backward's
    matmuls. Vectors are not worth a copy each.
    """
    if leaves[0].ndim == 1:
        return jnp.stack(leaves)
    stack = lax.empty((len(leaves), *leaves[0].shape), leaves[0].dtype)
    for i in reversed(range(len(leaves))):
        stack = lax.dynamic_update_index_in_dim(stack, leaves[i], i, 0)
    return lax.optimization_barrier(stack)
