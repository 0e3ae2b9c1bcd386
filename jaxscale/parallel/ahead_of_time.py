"""Machines that are not here: compile for described GPUs and read the collectives off the result."""

import importlib.resources
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from jaxscale.types import InputError, check_choice, check_positive

# Fields of a description that the parser of jax 0.10 does not know and refuses.
SINCE_JAX_0_11 = re.compile(
    "^ *(mem_clock_ghz|reserved_shared_memory_per_block|max_blocks_per_multiprocessor"
    "|collective_memory_granularity):.*$",
    re.MULTILINE,
)
MACHINES = {"h200": "h200.target_config.txtpb"}  # XLA's GpuTargetConfigProto, as text
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(rf"= (?P<type>.+?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]\w*)\[(?P<shape>[\d,]*)\]")


def described_devices(machine: str, *, num_hosts: int, gpus_per_host: int) -> list[jax.Device]:
    """Devices of a machine known by its description: a mesh of them compiles (`lower(...).compile()`) and never runs.

    Args:
        machine: one of MACHINES.
        num_hosts, gpus_per_host: how many.
    Raises:
        InputError: the machine is unknown, or the compiler's plugin is not installed.
    """
    check_choice("machine", machine, MACHINES)
    check_positive("num_hosts", num_hosts)
    check_positive("gpus_per_host", gpus_per_host)
    description = importlib.resources.files("jaxscale.parallel") / "data" / MACHINES[machine]
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise InputError("machine", machine, "the package jax-cuda13-plugin, of the same version as jax, to compile")
    target = description.read_text()
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=machine,
        target_config=target if jax.__version_info__ >= (0, 11) else SINCE_JAX_0_11.sub("", target),
        topology=f"{num_hosts}x{gpus_per_host}x1",
    )
    return list(topology.devices)


def collective_bytes(hlo: str) -> dict[str, list[int]]:
    """Bytes that each collective of a compiled module delivers on one device, by kind; a loop's body counts once.

    Args:
        hlo: text of the compiled module.
    """
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for match in _COLLECTIVE.finditer(hlo):
        # An asynchronous start has the type ((operands), results).
        result = match["type"].split("), ", 1)[-1] if match["type"].startswith("((") else match["type"]
        found[match["kind"]].append(sum(map(_num_bytes, _ARRAY.finditer(result))))
    return found


def _num_bytes(array: re.Match) -> int:
    return BYTES[array["type"]] * math.prod(int(size) for size in array["shape"].split(",") if size)
