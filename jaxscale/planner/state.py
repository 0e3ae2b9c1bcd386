"""Bytes of parameters, gradients and optimizer state on one device, by the sharding rules."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.models.parameters import abstract_params
from jaxscale.parallel.mesh import DATA, SEQUENCE, MeshConfig
from jaxscale.parallel.rules import Specs, all_axes_of, make_specs, mirror
from jaxscale.planner.job import Job
from jaxscale.train.optim import make_optimizer


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """What one device has of the parameters.

    Args:
        parameters: bytes between steps.
        moments: bytes of the optimizer's state between steps, wherever they rest.
        trained: bytes of the parameters whose moments these are.
        gradients: bytes of gradients in the reduction's type, as they add up over micro-batches.
        held: elements of the trained parameters during a step, as ZeRO-3 holds them.
        whole: elements of all parameters of a stage, gathered over ZeRO's axes.
        gathered: elements of its layers, gathered over ZeRO's axes.
        largest: elements of the largest period, gathered.
        largest_leaf: elements of the largest parameter of a stage, gathered.
        outside: elements of what is in no layer, gathered.
    """

    parameters: float = 0.0
    moments: float = 0.0
    trained: float = 0.0
    gradients: float = 0.0
    held: float = 0.0
    whole: float = 0.0
    gathered: float = 0.0
    largest: float = 0.0
    largest_leaf: float = 0.0
    outside: float = 0.0


class StateCounter:
    """Counts one job's state; meshes that shard it alike are counted once."""

    def __init__(self, job: Job):
        self.job = job
        self.flat = tree.flatten(job.table)
        self.moments = self._moment_bytes()
        self._counted: dict[tuple, StateBytes] = {}
        self._specs: dict[tuple, Specs] = {}

    def __call__(self, mesh: MeshConfig) -> StateBytes:
        """The state under a mesh.

        Raises:
            InputError: a dim does not divide over its axis, with the equation.
        """
        # All of a mesh that the state depends on.
        sharding = (mesh.zero_axes, mesh.expert_axis)
        key = (mesh.sizes, sharding, mesh.num_chunks, mesh.stage_periods)
        # Without ZeRO all is as on level 1, but for the moments.
        level = max(mesh.zero, 1)
        if (key, level) not in self._specs:
            leveled = mesh if mesh.zero else dataclasses.replace(mesh, zero=level)
            self._specs[key, level] = make_specs(self.job.table, leveled)
        if (key, mesh.zero) not in self._counted:
            self._counted[key, mesh.zero] = self._count(mesh, self._specs[key, level])
        return self._counted[key, mesh.zero]

    def _moment_bytes(self) -> dict[str, float]:
        """Bytes of the optimizer's state for an element of each parameter that is trained."""
        job = self.job
        params = abstract_params(job.table, job.policy.parameters)
        trained = tree.select(params, job.train.trainable)
        optimizer = make_optimizer(job.optimizer, steps=job.train.steps, table=job.table)
        state = jax.eval_shape(optimizer.init, trained)
        flat = tree.flatten(trained)
        names = tree.map_with_path(lambda path, _: path, trained)
        owners = tree.flatten(mirror(state, trained, names, ""))
        found = dict.fromkeys(flat, 0.0)
        for path, leaf in tree.flatten(state).items():
            if owner := owners[path]:
                found[owner] += leaf.dtype.itemsize * leaf.size / flat[owner].size
        return found

    def _count(self, mesh: MeshConfig, specs: Specs) -> StateBytes:
        of_moments = specs.optimizer if mesh.zero else specs.parameters
        stored, held, optimizer = (
            tree.flatten(each) for each in (specs.parameters, specs.held, of_moments)
        )
        padding = len(specs.layout.order) / specs.layout.num_periods
        width = np.dtype(self.job.policy.parameters).itemsize
        reduction = np.dtype(self.job.policy.reduction).itemsize
        sums: dict[str, float] = dict.fromkeys(vars(StateBytes()), 0.0)
        for path, entry in self.flat.items():
            size = math.prod(entry.shape) * (padding if entry.is_stacked else 1)
            shards = _num_shards(held[path], mesh)
            zero = _num_shards(held[path], mesh, (DATA, SEQUENCE))
            whole = size * zero / shards
            is_trained = path in self.moments
            shards_of_moments = _num_shards(optimizer[path], mesh)
            sums["parameters"] += size * width / _num_shards(stored[path], mesh)
            sums["moments"] += self.moments.get(path, 0.0) * size / shards_of_moments
            sums["trained"] += is_trained * size * width / shards_of_moments
            sums["gradients"] += is_trained * size * reduction / shards
            sums["held"] += is_trained * size / shards
            sums["whole"] += whole
            kind = "gathered" if entry.is_stacked else "outside"
            sums[kind] += whole
            sums["largest_leaf"] = max(sums["largest_leaf"], whole)
        sums["largest"] = sums["gathered"] * mesh.pipeline / len(specs.layout.order)
        return StateBytes(**sums)


def _num_shards(
    spec: PartitionSpec,
    mesh: MeshConfig,
    axes: tuple[str, ...] | None = None,
) -> int:
    """Parts that a spec cuts a leaf into, along all axes or some."""
    named = all_axes_of(spec)
    return math.prod(getattr(mesh, axis) for axis in named if axes is None or axis in axes)
