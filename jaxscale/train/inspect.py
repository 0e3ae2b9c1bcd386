"""`inspect`: what a run would be, computed from shapes alone."""

import dataclasses
import math
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.config import operative_config
from jaxscale.data.loader import DataConfig
from jaxscale.models.config import ModelConfig, training_flops_per_token
from jaxscale.models.parameters import abstract_params, count_parameters, parameter_table
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.rules import Specs, all_axes_of, make_specs, mirror
from jaxscale.train.host import is_on_host
from jaxscale.train.optim import OptimizerConfig, make_optimizer
from jaxscale.train.plan import TrainConfig, check_fit
from jaxscale.types import Params


def inspect(
    *,
    model: ModelConfig,
    mesh: MeshConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    policy: Policy = Policy(),
    stack: StackConfig = StackConfig(),
    **_: Any,
) -> None:
    """Prints the resolved configuration, parameter counts, the sharding table and bytes per device.

    Nothing is allocated and no device is needed; arguments as `train.pretrain.pretrain`.

    Raises:
        InputError: the parts do not fit one another.
    """
    check_fit(model=model, mesh=mesh, data=data, train=train, policy=policy, stack=stack)
    specs = make_specs(parameter_table(model), mesh)
    params = jax.eval_shape(
        lambda p: specs.layout.store(p, specs.dims), abstract_params(model, policy.parameters)
    )
    total, active = count_parameters(model)
    flops = training_flops_per_token(model, active, data.sequence_length)
    print(operative_config())
    print(_sharding_table(params, specs))
    print(f"\nparameters    {total:,} total, {active:,} active per token (look-up tables left out)")
    print(
        f"FLOPs         {flops:.4g} per token, forward and backward, at sequence length {data.sequence_length}"
    )
    print(f"mesh          {dataclasses.asdict(mesh)}, {math.prod(mesh.sizes)} devices")
    for name, size in bytes_per_device(params, specs, optimizer, train, policy, mesh).items():
        print(f"{name:<13} {_bytes_text(size)} per device")


def bytes_per_device(
    params: Params,
    specs: Specs,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    policy: Policy,
    mesh: MeshConfig,
) -> dict[str, int]:
    """Bytes that one device holds of parameters, gradients and optimizer state; activations are not in it.

    What rests of it in host memory comes after the sum and is not in it.

    Args:
        params: the parameter tree as shapes.
        specs, optimizer, train, policy, mesh: the run.
    """
    trained = tree.select(params, train.trainable)
    transformation: optax.GradientTransformation = make_optimizer(
        optimizer, steps=train.steps, dims=specs.dims
    )
    opt_state = jax.eval_shape(transformation.init, trained)
    opt_specs = mirror(
        opt_state, trained, tree.select(specs.optimizer, train.trainable), PartitionSpec()
    )
    gradients = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, policy.reduction), trained)
    # As they add up during the step; ZeRO-2 shards them only at its end.
    gradient_specs = tree.select(specs.held, train.trainable)
    sizes = {
        "parameters": _tree_bytes(params, specs.parameters, mesh),
        "gradients": _tree_bytes(gradients, gradient_specs, mesh),
        "optimizer": _tree_bytes(opt_state, opt_specs, mesh),
    }
    if not mesh.is_optimizer_on_host:
        return sizes | {"sum": sum(sizes.values())}
    counters = jax.tree.map(
        lambda leaf, away: None if away else leaf, opt_state, is_on_host(opt_state, trained)
    )
    host = sizes["optimizer"] - sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(counters)
    )
    sizes["optimizer"] -= host
    return sizes | {"sum": sum(sizes.values()), "on the host": host}


def _bytes_text(size: int) -> str:
    """In the largest unit that leaves a number of at least 1."""
    exponent = min(max(size, 1).bit_length() - 1, 49) // 10
    return f"{size / 2 ** (10 * exponent):.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


def _tree_bytes(abstract: Any, specs: Any, mesh: MeshConfig) -> int:
    return sum(
        jax.tree.leaves(
            jax.tree.map(lambda leaf, spec: _leaf_bytes(leaf, spec, mesh), abstract, specs)
        )
    )


def _leaf_bytes(leaf: Any, spec: PartitionSpec, mesh: MeshConfig) -> int:
    shards = math.prod(getattr(mesh, axis) for axis in all_axes_of(spec))
    return math.prod(leaf.shape) * leaf.dtype.itemsize // shards


def _sharding_table(params: Params, specs: Specs) -> str:
    rows = [("parameter", "dims", "shape", "stored", "optimizer state")]
    flat = [tree.flatten(t) for t in (params, specs.dims, specs.parameters, specs.optimizer)]
    for path in flat[0]:
        leaf, dims, stored, optimizer = (f[path] for f in flat)
        rows.append((path, dims, str(leaf.shape), _spec_text(stored), _spec_text(optimizer)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _spec_text(spec: PartitionSpec) -> str:
    return "(" + ", ".join("-" if entry is None else str(entry) for entry in spec) + ")"
