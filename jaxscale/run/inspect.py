"""`inspect`: what a run would be, computed from shapes alone."""

import dataclasses
import math
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.config import operative_config
from jaxscale.launch.memory import GIB, host_bytes
from jaxscale.models.config.model import training_flops_per_token
from jaxscale.models.parameters import Table, count_parameters, parameter_table
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.rules import Specs, all_axes_of, make_specs, mirror
from jaxscale.planner.cluster import DEVICES
from jaxscale.planner.memory import step_memory
from jaxscale.planner.state import StateCounter
from jaxscale.rlhf.rollouts import TENSOR
from jaxscale.run.chunks import chunk_lines, is_chunked, memory_of_chunks
from jaxscale.run.compile import memory_share
from jaxscale.run.fit import check_fit
from jaxscale.run.host import host_parts
from jaxscale.run.job import job_of, layout_of
from jaxscale.run.run import Run
from jaxscale.serve.hybrid_engine import specs_of_writing
from jaxscale.train.host import is_on_host
from jaxscale.train.optim import make_optimizer
from jaxscale.train.setup import check_training
from jaxscale.train.state import abstract_stored
from jaxscale.types import Params, check_positive


def inspect(*, run: Run, host_gib: float | None = None) -> None:
    """Prints the resolved configuration, parameter counts, the sharding table and bytes per device.

    Nothing is allocated and no device is needed. What lies beside the state during a step is
    estimated, see `planner.memory`; `jaxscale compile` asks the compiler.

    Args:
        run: the run.
        host_gib: GiB of host memory for each device, with which what rests there is compared and by
            which lengths in chunks are bounded; None compares with no host, and says so.
    Raises:
        InputError: the parts do not fit one another.
    """
    if host_gib is not None:
        check_positive("host_gib", host_gib)
    table = run.table()
    check_fit(run)
    check_training(table, run.loss(run), run.mesh, run.train)
    specs = make_specs(table, run.mesh)
    params = abstract_stored(table, specs, run.policy.parameters)
    total, active = count_parameters(table)
    length = run.data.sequence_length
    flops = training_flops_per_token(run.model, active, length)
    copy = 0 if run.rollouts is None else _bytes_of_writing(run)
    print(operative_config())
    print(_sharding_table(params, specs))
    print(f"\nparameters    {total:,} total, {active:,} active per token (look-up tables left out)")
    print(f"FLOPs         {flops:.4g} per token, forward and backward, at sequence length {length}")
    print(f"mesh          {dataclasses.asdict(run.mesh)}, {math.prod(run.mesh.sizes)} devices")
    sizes = bytes_per_device(run, table, specs)
    for name, size in sizes.items():
        print(f"{name:<13} {_bytes_text(size)} per device")
    between = sizes["parameters"] + sizes["optimizer"] + copy
    if copy:
        print(f"{'writing':<13} {_bytes_text(copy)} per device, a copy while answers are written")
    host_limit = math.inf if host_gib is None else host_gib * GIB
    critic = sizes["sum"] - _sum_without_critic(run)
    print("\n".join(_step_lines(run, between, critic, host_limit)))


def bytes_per_device(
    run: Run,
    table: Table,
    specs: Specs,
) -> dict[str, int]:
    """Bytes that one device holds of parameters, gradients and optimizer state.

    Activations are not in it. What rests of it in host memory comes after the sum and is not in it.

    Args:
        run: the run.
        table: of its parameters.
        specs: their shardings.
    """
    mesh, trainable = run.mesh, run.train.trainable
    params = abstract_stored(table, specs, run.policy.parameters)
    trained = tree.select(params, trainable)
    transformation: optax.GradientTransformation = make_optimizer(
        run.optimizer, steps=run.train.steps, table=table
    )
    opt_state = jax.eval_shape(transformation.init, trained)
    trained_specs = tree.select(specs.optimizer, trainable)
    opt_specs = mirror(opt_state, trained, trained_specs, PartitionSpec())
    reduction = run.policy.reduction
    gradients = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, reduction), trained)
    # As they add up during the step; ZeRO-2 shards them only at its end.
    gradient_specs = tree.select(specs.held, trainable)
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


def _sum_without_critic(run: Run) -> int:
    """Bytes of the state of the model alone, on each device."""
    table = parameter_table(run.model)
    return bytes_per_device(run, table, make_specs(table, run.mesh))["sum"]


def _bytes_of_writing(run: Run) -> int:
    """What each device holds beside the state while answers are written."""
    table, num_devices = parameter_table(run.model), math.prod(run.mesh.sizes)
    mesh, specs = specs_of_writing(table, num_devices, run.rollouts.tensor, TENSOR)
    params = abstract_stored(table, specs, run.policy.parameters)
    return _tree_bytes(params, specs.parameters, mesh)


def _step_lines(
    run: Run,
    between: int,
    critic: int,
    host_limit: float,
) -> list[str]:
    """What a step needs at its fullest moment, and which devices and hosts have that much.

    Args:
        run: the run.
        between: bytes that a device holds before a step.
        critic: bytes of a critic's state; what its forward keeps is not estimated.
        host_limit: bytes of the host for each device.
    """
    on_host = sum(host_parts(run).values())
    if is_chunked(run):
        largest = max(DEVICES.values(), key=lambda device: device.memory_bytes)
        lines = chunk_lines(run, largest.memory_bytes * memory_share(), host_limit)
        on_device = memory_of_chunks(run).on_device
    else:
        job, layout = job_of(run), layout_of(run)
        memory = step_memory(job, layout, StateCounter(job)(run.mesh))
        on_device = memory.total
        activations = memory.stashed + memory.workspace + memory.copies
        at_most = f"{_bytes_text(activations)} per device at the fullest moment, estimated"
        lines = [
            f"{'activations':<13} {at_most}",
            f"{'a step':<13} {_bytes_text(on_device)} per device, estimated",
        ]
    if critic:
        lines.append(
            f"{'the critic':<13} {_bytes_text(critic)} per device beside a step, its state"
        )
    needed = max(on_device + critic, between)
    return [*lines, *_fitting(run, needed, on_host, host_limit)]


def _fitting(run: Run, on_device: float, on_host: float, host_limit: float) -> list[str]:
    """Which devices have memory for a step, and whether their host has; a CPU's share the host's.

    This machine's host is another one than that of the devices, unless the run is on its CPU.
    """
    if run.runtime.platform == "cpu":
        there, needed = host_bytes(), (on_device + on_host) * math.prod(run.mesh.sizes)
        verdict = "unknown" if there is None else _verdict("this machine", needed, there)
        return [f"{'fits':<13} {verdict}"]
    share = memory_share()
    found = [_verdict(each.name, on_device, each.memory_bytes * share) for each in DEVICES.values()]
    lines = [f"{'fits':<13} {', '.join(found)} (JAX's share: {share:g} of the memory)"]
    if not on_host:
        return lines
    verdict = "compared with no host; give host_gib, what it has for each device"
    if not math.isinf(host_limit):
        verdict = _verdict("of host_gib", on_host, host_limit)
    return [*lines, f"{'host':<13} {_bytes_text(on_host)} per device, {verdict}"]


def _verdict(name: str, needed: float, there: float) -> str:
    return f"{name}: {'yes' if needed <= there else 'no'}, {_bytes_text(there)}"


def _bytes_text(size: float) -> str:
    """In the largest unit that leaves a number of at least 1."""
    exponent = min(max(int(size), 1).bit_length() - 1, 49) // 10
    return f"{size / 2 ** (10 * exponent):.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


def _tree_bytes(
    abstract: Any,
    specs: Any,
    mesh: MeshConfig,
) -> int:
    return sum(
        jax.tree.leaves(
            jax.tree.map(lambda leaf, spec: _leaf_bytes(leaf, spec, mesh), abstract, specs)
        )
    )


def _leaf_bytes(
    leaf: Any,
    spec: PartitionSpec,
    mesh: MeshConfig,
) -> int:
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
