"""What a run takes of its host's memory, by arithmetic, and whether this machine has it."""

import math

import jax

from jaxscale.launch.memory import GIB, pinnable_bytes
from jaxscale.planner.memory import host_memory
from jaxscale.planner.state import StateCounter
from jaxscale.run.chunks import is_chunked, memory_of_chunks
from jaxscale.run.job import job_of, layout_of
from jaxscale.run.run import Run
from jaxscale.types import InputError

# By what rests there, the field that sends it there, and what would take less.
FIELDS = {
    "inputs": ("FullyPipelined.inputs", "more device_input_bytes or a larger checkpoint_every"),
    "attention's outputs": ("FullyPipelined.attention", "attention = 'nowhere'"),
    "chunks": ("FullyPipelined.chunks", "chunks = 'device'"),
    "groups' inputs": ("ExecutionConfig.checkpoint_place", "a larger checkpoint_every"),
    "moments": ("MeshConfig.is_optimizer_on_host", "use_8bit_moments or more ZeRO shards"),
}


def host_parts(run: Run) -> dict[str, float]:
    """Bytes of a device's share of its host, by what rests there; see `planner.memory`."""
    if is_chunked(run):
        return {name: size for name, size in memory_of_chunks(run).host.items() if size}
    if not run.mesh.is_optimizer_on_host and run.execution.checkpoint_place != "host":
        return {}
    job = job_of(run)
    return host_memory(job, layout_of(run), StateCounter(job)(run.mesh))


def check_host(run: Run) -> None:
    """Raises InputError, part by part, unless this machine can pin the memory that a run takes."""
    there, parts = pinnable_bytes(), host_parts(run)
    # A smaller mesh leaves devices idle.
    num_here = min(jax.local_device_count(), math.prod(run.mesh.sizes))
    total = sum(parts.values())
    if there is None or total * num_here <= there:
        return
    text = " + ".join(f"{size / GIB:.2f} of {name}" for name, size in parts.items())
    given = f"{total / GIB:.2f} GiB of host memory a device: {text}"
    smaller = [FIELDS[name][1] for name in parts]
    if set(parts) != {"moments"}:
        smaller.insert(0, "a shorter sequence_length")
    expected = (
        f"at most {there / num_here / GIB:.2f} GiB, {there / GIB:.2f} for {num_here} devices: "
        f"{', '.join(smaller)}"
    )
    raise InputError(FIELDS[max(parts, key=parts.__getitem__)][0], given, expected)
