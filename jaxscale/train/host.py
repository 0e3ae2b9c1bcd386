"""Optimizer state that rests in host memory between updates and is updated part by part."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.parallel.rules import mirror
from jaxscale.types import Array, InputError

HOST = "pinned_host"  # JAX's name of page-locked memory, from which a GPU copies by itself
NUM_PARTS = 8  # a part is an eighth of the moments, or those of the largest parameter
SHARED = -1

Update = Callable[[Any, Any, Any], tuple[Any, Any]]


def is_on_host(opt_state: Any, trained: Any) -> Any:
    """Whether each leaf of the optimizer state rests on the host.

    Those that mirror a parameter do, counters do not.
    """
    return mirror(opt_state, trained, jax.tree.map(lambda _: True, trained), False)


def check_host_memory(device: jax.Device) -> None:
    """Raises InputError unless the device's backend has page-locked host memory."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        expected = f"False: platform {device.platform!r} has memories {kinds}, not {HOST!r}"
        raise InputError("MeshConfig.is_optimizer_on_host", True, expected)


def update_in_parts(
    update: Update,
    gradients: Any,
    opt_state: Any,
    trained: Any,
    *,
    after: Array,
) -> tuple[Any, Any]:
    """What `update` returns, with the moments of few parameters on the device at a time.

    Each part is the whole update with moments made up for all other parameters; what comes of those
    is used nowhere, so the compiler drops it. A part is fetched once the part before it is back on
    the host: to fetch two ahead took twice the memory, and the compiler's schedule let next to
    nothing overlap.

    Args:
        update: (gradients, opt_state, trained) -> (trained, opt_state), each parameter by its own
            moments.
        gradients, trained: on the device.
        opt_state: its moments on the host.
        after: what is known when the first part may be fetched.
    Returns:
        The new parameters, on the device, and optimizer state, its moments on the host.
    Cost: the bytes of the moments over the link to the host, once each way.
    """
    state, state_structure = jax.tree.flatten(opt_state)
    params, structure = jax.tree.flatten(trained)
    numbers = jax.tree.unflatten(structure, range(len(params)))
    owners = jax.tree.leaves(mirror(opt_state, trained, numbers, SHARED))
    given = [
        leaf if owner == SHARED else jnp.zeros(leaf.shape, leaf.dtype)
        for leaf, owner in zip(state, owners, strict=True)
    ]
    shared = [i for i, owner in enumerate(owners) if owner == SHARED]
    new_state, done = list(state), [after]
    for part in parts([param.size for param in params]):
        ours = [i for i, owner in enumerate(owners) if owner in part]
        waiting, _ = lax.optimization_barrier(([state[i] for i in ours], done))
        fetched = jax.device_put(waiting, jax.memory.Space.Device)
        here = dict(zip(ours, fetched, strict=True))
        whole = [here.get(i, leaf) for i, leaf in enumerate(given)]
        whole = jax.tree.unflatten(state_structure, whole)
        got_params, got_state = map(jax.tree.leaves, update(gradients, whole, trained))
        done = jax.device_put([got_state[i] for i in ours], jax.memory.Space.Host)
        for i, leaf in zip(ours, done, strict=True):
            new_state[i] = leaf
        for number in part:
            params[number] = got_params[number]
    for i in shared:
        new_state[i] = got_state[i]
    return jax.tree.unflatten(structure, params), jax.tree.unflatten(state_structure, new_state)


def parts(sizes: Sequence[int]) -> list[range]:
    """Cuts consecutive numbers into parts of at most the largest size or the sum over NUM_PARTS."""
    limit = max(*sizes, sum(sizes) / NUM_PARTS) if sizes else 0
    found, start = [], 0
    for number in range(1, len(sizes) + 1):
        if number == len(sizes) or sum(sizes[start : number + 1]) > limit:
            found.append(range(start, number))
            start = number
    return found


def through_device(
    convert: Callable[[Array], Array],
    leaf: Array,
    wanted: jax.sharding.Sharding,
) -> Array:
    """Converts a leaf that rests on the host, on the device, to a new copy on the host.

    Waits for it, so that one leaf is on the device at a time.
    """
    here = jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
    return jax.block_until_ready(jax.device_put(convert(here), wanted))
