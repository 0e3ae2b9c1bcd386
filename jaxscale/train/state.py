"""The training state, how it starts and where each of its leaves lives."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxscale import tree
from jaxscale.models.parameters import Table, abstract_params
from jaxscale.parallel.rules import Specs, mirror
from jaxscale.train.host import HOST, is_on_host
from jaxscale.types import Params


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "key", "is_finite"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Args:
        step: [] int32, finished steps.
        params: the parameter tree, in the policy's parameter type.
        opt_state: optimizer state of the trainable parameters.
        key: typed PRNG key of the run; step n draws from fold_in(key, n).
        is_finite: [] bool; False once a loss, the norm of the gradients or that of the parameters
            was not finite, after which no step changes anything.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    is_finite: jax.Array


def abstract_state(
    table: Table,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    specs: Specs,
    dtype: str,
    trainable: str,
) -> TrainState:
    """The state as shapes with shardings: what init makes and a checkpoint is restored to."""
    params = abstract_stored(table, specs, dtype)
    trained = tree.select(params, trainable)
    opt_state = jax.eval_shape(optimizer.init, trained)
    trained_specs = tree.select(specs.optimizer, trainable)
    opt_specs = mirror(opt_state, trained, trained_specs, PartitionSpec())

    def place(
        leaf: Any,
        spec: PartitionSpec,
        is_on_host: bool = False,
    ) -> jax.ShapeDtypeStruct:
        kind = HOST if is_on_host and specs.is_optimizer_on_host else None
        return leaf.update(sharding=NamedSharding(mesh, spec, memory_kind=kind))

    scalar = PartitionSpec()
    is_host = is_on_host(opt_state, trained)
    return TrainState(
        step=place(jax.ShapeDtypeStruct((), jnp.int32), scalar),
        params=jax.tree.map(place, params, specs.parameters),
        opt_state=jax.tree.map(place, opt_state, opt_specs, is_host),
        key=place(jax.eval_shape(lambda: jax.random.key(0)), scalar),
        is_finite=place(jax.ShapeDtypeStruct((), jnp.bool_), scalar),
    )


def stored_params(
    table: Table,
    mesh: Mesh,
    specs: Specs,
    dtype: str,
) -> Params:
    """The parameters as a run stores them, permuted and padded for its stages.

    Returns:
        Shapes with shardings.
    """
    return jax.tree.map(
        lambda leaf, spec: leaf.update(sharding=NamedSharding(mesh, spec)),
        abstract_stored(table, specs, dtype),
        specs.parameters,
    )


def abstract_stored(
    table: Table,
    specs: Specs,
    dtype: str,
) -> Params:
    """The parameters as a run stores them, as shapes without shardings."""
    params = abstract_params(table, dtype)
    return jax.eval_shape(lambda params: specs.layout.store(params, specs.dims), params)


def rests_on_host(
    abstract: TrainState,
    specs: Specs,
    trainable: str,
) -> TrainState:
    """Whether each leaf of the state is in host memory between steps."""
    nowhere = jax.tree.map(lambda _: False, abstract)
    if not specs.is_optimizer_on_host:
        return nowhere
    moments = is_on_host(abstract.opt_state, tree.select(abstract.params, trainable))
    return dataclasses.replace(nowhere, opt_state=moments)


def state_dims(
    abstract: TrainState,
    specs: Specs,
    trainable: str,
) -> TrainState:
    """Dim letters of every leaf of the state; "" where it mirrors no parameter."""
    trained = tree.select(abstract.params, trainable)
    opt_state = mirror(abstract.opt_state, trained, tree.select(specs.dims, trainable), "")
    return TrainState(step="", params=specs.dims, opt_state=opt_state, key="", is_finite="")


def run_key(seed: int) -> jax.Array:
    """The key from which the draws of a run with `seed` derive; initial parameters have another."""
    return jax.random.fold_in(jax.random.key(seed), 1)
