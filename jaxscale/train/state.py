"""The training state, how it starts and where each of its leaves lives."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxscale import tree
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import abstract_params, init_params
from jaxscale.parallel.rules import Specs, mirror
from jaxscale.train.host import HOST, is_on_host
from jaxscale.types import Params

# The generator is slow to optimise (seconds a leaf on a CPU) and runs once.
RUNS_ONCE = {"xla_backend_optimization_level": 0}


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
        is_finite: [] bool; False once a loss or gradient was not finite, after which no step
            changes anything.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    is_finite: jax.Array


def abstract_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    specs: Specs,
    dtype: str,
    trainable: str,
) -> TrainState:
    """The state as shapes with shardings, nothing allocated: what init makes and a checkpoint is restored to."""
    params = jax.eval_shape(
        lambda params: specs.layout.store(params, specs.dims), abstract_params(model, dtype)
    )
    trained = tree.select(params, trainable)
    opt_state = jax.eval_shape(optimizer.init, trained)
    trained_specs = tree.select(specs.optimizer, trainable)
    opt_specs = mirror(opt_state, trained, trained_specs, PartitionSpec())

    def place(leaf: Any, spec: PartitionSpec, is_on_host: bool = False) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(
            mesh, spec, memory_kind=HOST if is_on_host and specs.is_optimizer_on_host else None
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    scalar = PartitionSpec()
    return TrainState(
        step=place(jax.ShapeDtypeStruct((), jnp.int32), scalar),
        params=jax.tree.map(place, params, specs.parameters),
        opt_state=jax.tree.map(place, opt_state, opt_specs, is_on_host(opt_state, trained)),
        key=place(jax.eval_shape(lambda: jax.random.key(0)), scalar),
        is_finite=place(jax.ShapeDtypeStruct((), jnp.bool_), scalar),
    )


def rests_on_host(abstract: TrainState, specs: Specs, trainable: str) -> TrainState:
    """Whether each leaf of the state is in host memory between steps."""
    nowhere = jax.tree.map(lambda _: False, abstract)
    if not specs.is_optimizer_on_host:
        return nowhere
    moments = is_on_host(abstract.opt_state, tree.select(abstract.params, trainable))
    return dataclasses.replace(nowhere, opt_state=moments)


def state_dims(abstract: TrainState, specs: Specs, trainable: str) -> TrainState:
    """Dim letters of every leaf of the state; "" where it mirrors no parameter."""
    trained = tree.select(abstract.params, trainable)
    opt_state = mirror(abstract.opt_state, trained, tree.select(specs.dims, trainable), "")
    return TrainState(step="", params=specs.dims, opt_state=opt_state, key="", is_finite="")


def run_key(seed: int) -> jax.Array:
    """The key from which the draws of a run with `seed` derive; its initial parameters have another one."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    *,
    specs: Specs,
    seed: int,
    trainable: str,
) -> TrainState:
    """The first state, each leaf made where it lives; the same numbers on any mesh."""
    dtype = jax.tree.leaves(abstract.params)[0].dtype

    def init() -> TrainState:
        key = jax.random.key(seed)
        params = specs.layout.store(
            init_params(model, jax.random.fold_in(key, 0), dtype), specs.dims
        )
        opt_state = optimizer.init(tree.select(params, trainable))
        return TrainState(jnp.int32(0), params, opt_state, run_key(seed), jnp.bool_(True))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings, compiler_options=RUNS_ONCE)()
