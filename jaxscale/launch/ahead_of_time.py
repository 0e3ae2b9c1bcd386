"""Machines that are not here: compiling for their devices, and the memory that the result needs.

Some of this needs private parts of JAX, for which it has no public ones:

- `as_on` and `compile_with_host` replace functions of `jax._src.cudnn` and `jax._src.compiler`
  for a time. If JAX renames one, `_replaced` raises AttributeError. If JAX no longer calls one,
  tests/launch/test_ahead_of_time.py fails.
- `compile_with_host` reads `Lowered._lowering` and uses `jax._src.core` and XLA's own client. It
  raises AttributeError or KeyError if they change.
"""

import contextlib
import dataclasses
import importlib.resources
import importlib.util
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import compiler, core
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention
from jax._src.lib import xla_client
from jax.experimental import topologies

from jaxscale.ops import device as ops_device
from jaxscale.types import InputError, check_choice, check_positive

# Fields of a description that the parser of jax 0.10 does not know and refuses.
SINCE_JAX_0_11 = re.compile(
    "^ *(mem_clock_ghz|reserved_shared_memory_per_block|max_blocks_per_multiprocessor"
    "|collective_memory_granularity):.*$",
    re.MULTILINE,
)
# Each is XLA's GpuTargetConfigProto, as text; that of the H200 is what XLA found on one.
MACHINES = {name: f"{name}.target_config.txtpb" for name in ("a100", "b200", "h200")}
CUDNN_VERSION = 91200  # against which JAX's plugin was built


def has_plugin() -> bool:
    """Whether the compiler for described GPUs is installed; it needs no GPU."""
    has_any = importlib.util.find_spec("jax_plugins") is not None
    return has_any and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


def described_devices(
    machine: str,
    *,
    num_hosts: int,
    gpus_per_host: int,
) -> list[jax.Device]:
    """Devices of a machine that is known by its description alone.

    What is lowered for a mesh of them compiles, and never runs. Where CUDA's libraries are missing,
    JAX must have been told to use the platform "cpu".

    Args:
        machine: one of MACHINES.
        num_hosts, gpus_per_host: how many.
    Raises:
        InputError: the machine is unknown, or the compiler's plugin is not installed.
    """
    check_choice("machine", machine, MACHINES)
    check_positive("num_hosts", num_hosts)
    check_positive("gpus_per_host", gpus_per_host)
    if not has_plugin():
        package = "the package jax-cuda13-plugin, of the same version as jax"
        expected = f"{package}: pip install 'jaxscale[compile]'"
        raise InputError("machine", machine, expected)
    target = _description(machine)
    if jax.__version_info__ < (0, 11):
        target = SINCE_JAX_0_11.sub("", target)
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=machine,
        target_config=target,
        topology=f"{num_hosts}x{gpus_per_host}x1",
    )
    return list(topology.devices)


def device_memory_bytes(machine: str) -> int:
    """Memory of one GPU as its driver reports it, before JAX takes its share."""
    pattern = re.compile(r"^ *device_memory_size: (\d+)$", re.MULTILINE)
    match = pattern.search(_description(machine))
    return int(match[1])


def _description(machine: str) -> str:
    folder = importlib.resources.files("jaxscale.launch") / "data"
    return (folder / MACHINES[machine]).read_text()


class _Replacement(NamedTuple):
    """A function of a module, and what takes its place for a time."""

    module: types.ModuleType
    name: str
    function: Callable


@contextlib.contextmanager
def _replaced(replacements: Sequence[_Replacement]) -> Iterator[None]:
    """Within it the functions are replaced; raises AttributeError for one that does not exist."""
    with contextlib.ExitStack() as restore:
        for module, name, function in replacements:
            original = getattr(module, name)
            restore.callback(setattr, module, name, original)
            setattr(module, name, function)
        yield


@contextlib.contextmanager
def as_on(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Within it, what is traced is what a process on such devices would trace, though it has none.

    Backends are chosen by the platform that JAX has started and by its GPUs' capability. Before JAX
    emits a call of cuDNN's attention, it asks cuDNN for its version and the first local GPU for its
    capability. Those questions are answered here from the description; the calls themselves are
    compiled as they are on the machine.
    """
    with _replaced(_answers(devices)):
        yield


def _answers(devices: Sequence[jax.Device]) -> list[_Replacement]:
    device = devices[0]
    started = [
        _Replacement(jax, "default_backend", lambda: device.platform),
        _Replacement(ops_device.described, "device_kind", lambda: device.device_kind),
    ]
    if device.platform == "tpu":
        return started
    capability = _numbers(device.compute_capability)

    def is_at_least(least: str) -> bool:
        return capability >= _numbers(least)

    def is_equal(asked: str) -> bool:
        return capability == _numbers(asked)

    return [
        *started,
        _Replacement(ops_device.described, "compute_capability", lambda: device.compute_capability),
        # Private to JAX: jax._src.cudnn.fused_attention_stablehlo.
        _Replacement(cudnn_attention, "check_cudnn_version", lambda: CUDNN_VERSION),
        _Replacement(cudnn_attention, "check_compute_capability", is_at_least),
        _Replacement(cudnn_attention, "is_cuda_compute_capability_equal", is_equal),
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def compile_with_host(
    lowered: jax.stages.Lowered,
    *,
    arguments: Sequence[bool],
    results: Sequence[bool],
) -> jax.stages.Compiled:
    """Compiles for described devices what finds arguments in host memory and leaves results there.

    Described devices' shardings have no memory kind, so the memory of each argument and result is
    told to the compiler directly.

    Args:
        lowered: its function moves those arrays itself, by `device_put` to a `jax.memory.Space`.
        arguments, results: whether each leaf is in host memory; missing at the end means it is not.
    """
    # Private to JAX: the arguments that tracing has found to be used; the others are dropped.
    used = lowered._lowering.compile_args["kept_var_idx"]
    given = _in_memories(lowered.in_avals, arguments)
    given = [shape for number, shape in enumerate(given) if number in used]
    returned = _in_memories(lowered.out_info, results)
    # Of CompileOptionsProto: argument_layouts = 1, executable_build_options = 3 with result_layout
    # = 2, a ShapeProto with element_type = 2 (a tuple's is 13) and tuple_shapes = 4. Appended
    # fields join those that are there.
    result = _field(2, 13) + _fields(4, returned)
    layouts = _fields(1, given) + _field(3, _field(2, result))
    # Private to JAX: jax._src.compiler.get_compile_options.
    get_compile_options = compiler.get_compile_options

    def with_layouts(*args: Any, **kwargs: Any) -> Any:
        options = get_compile_options(*args, **kwargs).SerializeAsString()
        return xla_client.CompileOptions.ParseFromString(options + layouts)

    with _replaced([_Replacement(compiler, "get_compile_options", with_layouts)]):
        return lowered.compile()


def _in_memories(tree: Any, flags: Sequence[bool]) -> list[bytes]:
    """A ShapeProto for each leaf; whether it is in host memory is in `flags`."""
    leaves = jax.tree.leaves(tree)
    num_missing = len(leaves) - len(flags)
    flags = [*flags, *[False] * num_missing]
    return [_in_memory(leaf, is_host) for leaf, is_host in zip(leaves, flags, strict=True)]


def _in_memory(leaf: Any, is_host: bool) -> bytes:
    """A row-major ShapeProto: its layout = 5 has memory_space = 8, in which the host's is 5."""
    aval = core.physical_aval(core.ShapedArray(leaf.shape, leaf.dtype))
    minor_to_major = tuple(reversed(range(aval.ndim)))
    shape = xla_client.Shape.array_shape(np.dtype(aval.dtype), aval.shape, minor_to_major)
    memory = _field(5, _field(8, 5)) if is_host else b""
    return shape.to_serialized_proto() + memory


def _fields(number: int, values: Sequence[bytes]) -> bytes:
    """A repeated field in the wire format of protocol buffers."""
    return b"".join(_field(number, value) for value in values)


def _field(number: int, value: int | bytes) -> bytes:
    """One field in the wire format of protocol buffers."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth bit says that more follow."""
    low, high = number & 127, number >> 7
    if high == 0:
        return bytes([low])
    return bytes([low | 128]) + _varint(high)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a compiled function needs on each device.

    Args:
        arguments: what it is given.
        outputs: what it returns and does not write over its arguments.
        temporaries: everything in between, as the compiler has laid it out in one block.
        host: in the host's memory, whatever for; not in the others.
    """

    arguments: int
    outputs: int
    temporaries: int
    host: int = 0

    @property
    def peak(self) -> int:
        """All of them: none is freed before the function returns."""
        return self.arguments + self.outputs + self.temporaries


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """The compiler's own figures."""
    figures = compiled.memory_analysis()
    host = (
        figures.host_argument_size_in_bytes
        + figures.host_output_size_in_bytes
        - figures.host_alias_size_in_bytes
        + figures.host_temp_size_in_bytes
    )
    return Memory(
        arguments=figures.argument_size_in_bytes,
        outputs=figures.output_size_in_bytes - figures.alias_size_in_bytes,
        temporaries=figures.temp_size_in_bytes,
        host=host,
    )
