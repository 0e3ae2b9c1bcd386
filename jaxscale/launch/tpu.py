"""TPUs that are not here: devices to compile for, known by the name of their topology."""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from jaxscale.types import InputError

# Memory of one chip: Google Cloud, "TPU v5e" and "TPU v5p", system architecture.
MEMORY_BYTES = {"v5e": 16 * 2**30, "v5p": 95 * 2**30}
# Without them libtpu asks Google's servers what it runs on, and complains that none answers.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def has_compiler() -> bool:
    """Whether the compiler for TPUs is installed; it needs no TPU."""
    return importlib.util.find_spec("libtpu") is not None


def described_chips(topology: str) -> list[jax.Device]:
    """Chips of a topology that is known by its name alone, such as "v5e:2x4" or "v5p:2x2x4".

    What is lowered for a mesh of them compiles, and never runs.

    Raises:
        InputError: the kind is unknown, it has no such grid of chips, or libtpu is not installed.
    """
    if re.fullmatch(rf"({'|'.join(MEMORY_BYTES)}):\d+x\d+(x\d+)?", topology) is None:
        expected = 'KIND:CHIPSxCHIPS[xCHIPS] of v5e or v5p, such as "v5e:2x4"'
        raise InputError("topology", topology, expected)
    if not has_compiler():
        expected = "the package libtpu that goes with this jax: pip install 'jaxscale[tpu]'"
        raise InputError("topology", topology, expected)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        expected = f"a grid of chips that there is: {reason}"
        raise InputError("topology", topology, expected) from error
    return list(found.devices)
