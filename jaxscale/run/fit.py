"""Whether the parts of a run fit one another: what is refused before anything is allocated."""

import math
from typing import TYPE_CHECKING

import jax

from jaxscale.models.execution import ByChunk, ExecutionConfig
from jaxscale.ops.attention import AttentionContext, check_backend
from jaxscale.ops.attention.intervals import attention_over_intervals
from jaxscale.parallel.mesh import check_batch, nearest_divisors
from jaxscale.parallel.pipeline.stages import StageLayout
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.head_chunks import HeadChunks
from jaxscale.types import InputError

if TYPE_CHECKING:
    from jaxscale.run.run import Run


def check_fit(run: "Run") -> None:
    """Raises InputError, with what fails, unless lengths, batch, chunks and kernels fit."""
    length, mesh = run.data.sequence_length, run.mesh
    if length > run.model.max_length:
        expected = f"sequence_length <= max_length = {run.model.max_length}"
        raise InputError("DataConfig.sequence_length", length, expected)
    _check_kernels(run)
    # A ring's backends refuse when the step is traced, which is before anything is written.
    if mesh.ring == 1:
        check_attention(run)
    check_batch(
        mesh,
        batch_size=run.data.batch_size,
        length=length,
        num_microbatches=run.train.num_microbatches,
    )
    if mesh.pipeline > 1:
        _check_places(run.execution)
    stages = StageLayout(run.model.num_periods, mesh.pipeline, mesh.num_chunks, mesh.stage_periods)
    run.execution.check_periods(stages.num_slots, num_stages=stages.num_virtual)
    if isinstance(run.execution.strategy, FullyPipelined):
        _check_pipelined(run)
    if isinstance(run.execution.strategy, ByChunk | HeadChunks) and mesh.tensor > 1:
        expected = "Whole() with MeshConfig.tensor > 1, whose members have other tokens each"
        raise InputError("ExecutionConfig.strategy", run.execution.strategy, expected)
    if run.execution.is_batch_invariant and math.prod(mesh.sizes) > mesh.data:
        expected = "a mesh of data alone with the strategy BatchInvariant"
        raise InputError("ExecutionConfig.strategy", run.execution.strategy, expected)
    own = length // (mesh.sequence * mesh.tensor)
    num_chunks = run.execution.num_loss_chunks
    if rest := own % num_chunks:
        expected = (
            "sequence_length / (sequence * tensor) % num_loss_chunks == 0, here "
            f"{length} / ({mesh.sequence} * {mesh.tensor}) % {num_chunks} = {rest}; nearest: "
            f"{nearest_divisors(own, num_chunks)}"
        )
        raise InputError("ExecutionConfig.num_loss_chunks", num_chunks, expected)


def _check_pipelined(run: "Run") -> None:
    """Refuses what does not go with `FullyPipelined`."""
    mesh, execution = run.mesh, run.execution
    if execution.remat != "none":
        expected = '"none" with FullyPipelined, which keeps what its backward needs by itself'
        raise InputError("ExecutionConfig.remat", execution.remat, expected)
    if mesh.ring > 1:
        expected = "1 with FullyPipelined, whose chunks every shard of the sequence exchanges"
        raise InputError("MeshConfig.ring", mesh.ring, expected)
    num_rows = run.data.batch_size // (mesh.num_batch_shards * run.train.num_microbatches)
    if mesh.tensor > 1 and num_rows > 1:
        expected = (
            "batch_size / (data * expert * num_microbatches) == 1 with FullyPipelined and "
            f"MeshConfig.tensor > 1, here {num_rows}"
        )
        raise InputError("DataConfig.batch_size", run.data.batch_size, expected)
    if not run.model.is_causal or any(layer.attention.layout for layer in run.model.layers):
        expected = "Whole() where attention is not causal or has a layout of blocks"
        raise InputError("ExecutionConfig.strategy", execution.strategy, expected)
    execution.strategy.check(
        length=run.data.sequence_length, sequence=mesh.sequence, tensor=mesh.tensor
    )


def _check_places(execution: ExecutionConfig) -> None:
    """Refuses what would rest on the host beside a pipeline, whose slots are on the device."""
    strategy = execution.strategy
    if isinstance(strategy, FullyPipelined) and not strategy.is_on_device:
        places = 'inputs and chunks = "device" and attention "device" or "nowhere"'
        refused = "FullyPipelined", strategy, places
    elif execution.checkpoint_every > 1 and execution.checkpoint_place == "host":
        refused = "ExecutionConfig.checkpoint_place", "host", '"device"'
    elif execution.offloaded_names:
        refused = "ExecutionConfig.offloaded_names", execution.offloaded_names, "none"
    else:
        return
    parameter, given, expected = refused
    reason = "MeshConfig.pipeline > 1, whose slots for what a stage keeps are on the device"
    raise InputError(parameter, given, f"{expected} with {reason}")


def _check_kernels(run: "Run") -> None:
    """Refuses kernels that were named for a type that none of them takes."""
    named, compute = run.runtime.kernels, run.policy.compute
    if named not in (None, "xla") and compute not in ("bfloat16", "float16"):
        expected = f"'xla' or None with Policy.compute = {compute!r}: they take 16-bit floats"
        raise InputError("RuntimeConfig.kernels", named, expected)


def check_attention(run: "Run") -> None:
    """Raises InputError for what a named backend of attention would refuse when it is traced."""
    named = run.execution.attention
    if named is None:
        return
    shape = (run.data.batch_size, run.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, "int32")
    for layer in run.model.layers:
        attention = layer.attention
        heads = (*shape, attention.num_heads, attention.head_dim)
        q = jax.ShapeDtypeStruct(heads, run.policy.compute)
        context = AttentionContext(tokens, segments=tokens, softcap=attention.softcap)
        if isinstance(run.execution.strategy, FullyPipelined):
            attention_over_intervals(q, context, implementation=named)
        else:
            check_backend("ExecutionConfig.attention", named, q, context)
