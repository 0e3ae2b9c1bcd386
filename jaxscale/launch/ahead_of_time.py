"""Machines that are not here: compile for described GPUs and read memory and collectives off the result."""

import collections
import contextlib
import dataclasses
import importlib.resources
import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import compiler, core
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention
from jax._src.lib import xla_client
from jax.experimental import topologies

from jaxscale.ops import device
from jaxscale.types import InputError, check_choice, check_positive

# Fields of a description that the parser of jax 0.10 does not know and refuses.
SINCE_JAX_0_11 = re.compile(
    "^ *(mem_clock_ghz|reserved_shared_memory_per_block|max_blocks_per_multiprocessor"
    "|collective_memory_granularity):.*$",
    re.MULTILINE,
)
MACHINES = {"h200": "h200.target_config.txtpb"}  # XLA's GpuTargetConfigProto, as text
CUDNN_VERSION = 91200  # against which JAX's plugin was built
KINDS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
)
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_COLLECTIVE = re.compile(rf"= (?P<type>.+?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]\w*)\[(?P<shape>[\d,]*)\]")
_COMPUTATION = re.compile(
    r"^(?:ENTRY )?%?(?P<name>[\w.-]+) [^\n]*\{\n(?P<body>.*?)^\}", re.MULTILINE | re.DOTALL
)
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|\w+_computations?)=\{?(?P<names>%[\w.-]+(?:, %[\w.-]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def has_plugin() -> bool:
    """Whether the compiler for described GPUs is installed; it needs no GPU."""
    has_any = importlib.util.find_spec("jax_plugins") is not None
    return has_any and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


def described_devices(machine: str, *, num_hosts: int, gpus_per_host: int) -> list[jax.Device]:
    """Devices of a machine known by its description: a mesh of them compiles (`lower(...).compile()`) and never runs.

    Where CUDA's libraries are missing, JAX must have been told to use the platform "cpu".

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
        expected = "the package jax-cuda13-plugin, of the same version as jax: pip install 'jaxscale[compile]'"
        raise InputError("machine", machine, expected)
    target = _description(machine)
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=machine,
        target_config=target if jax.__version_info__ >= (0, 11) else SINCE_JAX_0_11.sub("", target),
        topology=f"{num_hosts}x{gpus_per_host}x1",
    )
    return list(topology.devices)


def device_memory_bytes(machine: str) -> int:
    """Memory of one GPU as its driver reports it, before JAX takes its share."""
    return int(re.search(r"^ *device_memory_size: (\d+)$", _description(machine), re.MULTILINE)[1])


def _description(machine: str) -> str:
    return (importlib.resources.files("jaxscale.launch") / "data" / MACHINES[machine]).read_text()


@contextlib.contextmanager
def as_on_gpus(devices: list[jax.Device]) -> Iterator[None]:
    """Within it, what is traced is what a process on such GPUs would trace, though this one has none.

    Backends are chosen by the platform that JAX has started and by its GPUs' capability, and JAX
    asks cuDNN for its version and the first local GPU for its capability before it emits a call of
    cuDNN's attention. Those five questions are answered here from the description; the calls
    themselves are compiled as they are on the machine.
    """
    capability = _numbers(devices[0].compute_capability)
    answers = [
        (jax, "default_backend", lambda: devices[0].platform),
        (device, "compute_capability", lambda: devices[0].compute_capability),
        (cudnn_attention, "check_cudnn_version", lambda: CUDNN_VERSION),
        (cudnn_attention, "check_compute_capability", lambda least: capability >= _numbers(least)),
        (
            cudnn_attention,
            "is_cuda_compute_capability_equal",
            lambda asked: capability == _numbers(asked),
        ),
    ]
    with contextlib.ExitStack() as restore:
        for module, name, answer in answers:
            restore.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, answer)
        yield


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def compile_with_host(
    lowered: jax.stages.Lowered, *, arguments: Sequence[bool], results: Sequence[bool]
) -> jax.stages.Compiled:
    """Compiles for described devices what finds arguments in host memory and leaves results there.

    Their shardings have no memory kind, so each argument's and result's memory is told to the
    compiler directly.

    Args:
        lowered: its function moves those arrays itself, by `device_put` to a `jax.memory.Space`.
        arguments, results: whether each leaf is in host memory; missing at the end means it is not.
    """
    given = [
        _in_memory(aval, is_host)
        for i, (aval, is_host) in enumerate(_paired(lowered.in_avals, arguments))
        if i in lowered._lowering.compile_args["kept_var_idx"]
    ]
    returned = [_in_memory(info, is_host) for info, is_host in _paired(lowered.out_info, results)]
    # Of CompileOptionsProto: argument_layouts = 1, executable_build_options = 3 with result_layout
    # = 2, a ShapeProto with element_type = 2 (a tuple's is 13) and tuple_shapes = 4. Appended
    # fields join those that are there.
    result = _field(2, 13) + b"".join(_field(4, shape) for shape in returned)
    layouts = b"".join(_field(1, shape) for shape in given) + _field(3, _field(2, result))
    make_options = compiler.get_compile_options

    def make_options_with_layouts(*args: Any, **kwargs: Any) -> Any:
        options = make_options(*args, **kwargs)
        return xla_client.CompileOptions.ParseFromString(options.SerializeAsString() + layouts)

    with contextlib.ExitStack() as restore:
        restore.callback(setattr, compiler, "get_compile_options", make_options)
        compiler.get_compile_options = make_options_with_layouts
        return lowered.compile()


def _paired(tree: Any, flags: Sequence[bool]) -> list[tuple[Any, bool]]:
    leaves = jax.tree.leaves(tree)
    return list(zip(leaves, [*flags, *[False] * (len(leaves) - len(flags))], strict=True))


def _in_memory(leaf: Any, is_host: bool) -> bytes:
    """A row-major ShapeProto: its layout = 5 has memory_space = 8, in which the host's is 5."""
    aval = core.physical_aval(core.ShapedArray(leaf.shape, leaf.dtype))
    shape = xla_client.Shape.array_shape(
        np.dtype(aval.dtype), aval.shape, tuple(reversed(range(aval.ndim)))
    )
    return shape.to_serialized_proto() + (_field(5, _field(8, 5)) if is_host else b"")


def _field(number: int, value: int | bytes) -> bytes:
    """One field in the wire format of protocol buffers."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + _varint(high) if high else bytes([low])


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
    return Memory(
        figures.argument_size_in_bytes,
        figures.output_size_in_bytes - figures.alias_size_in_bytes,
        figures.temp_size_in_bytes,
        figures.host_argument_size_in_bytes
        + figures.host_output_size_in_bytes
        - figures.host_alias_size_in_bytes
        + figures.host_temp_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled module.

    Args:
        kind: one of KINDS.
        num_bytes: what it delivers on one device, each time.
        times: how often it runs: the product of the trip counts of the loops around it. Of a
            conditional's branches the one counts as taken that delivers most bytes: the slots of a
            pipeline are branches that do the same.
        is_exact: False where a loop around it does not say how often it runs, and was counted once.
    """

    kind: str
    num_bytes: int
    times: int
    is_exact: bool


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled module.

    Args:
        hlo: text of the compiled module.
    """
    computations = {match["name"]: match["body"] for match in _COMPUTATION.finditer(hlo)}
    delivered: collections.Counter[str] = (
        collections.Counter()
    )  # by a computation each time it runs
    for name, body in computations.items():  # callers are printed after what they call
        for line in body.splitlines():
            delivered[name] += sum(
                _num_trips(line) * delivered[each] for each in _taken(line, delivered)
            )
            delivered[name] += _delivered_bytes(match) if (match := _COLLECTIVE.search(line)) else 0
    times, is_exact = (
        collections.Counter(list(computations)[-1:]),
        collections.defaultdict(lambda: True),
    )
    found = []
    for name, body in reversed(computations.items()):
        for line in body.splitlines():
            for each in _taken(line, delivered):
                times[each] += times[name] * _num_trips(line)
                is_exact[each] &= is_exact[name] and (
                    " while(" not in line or _TRIPS.search(line) is not None
                )
            if times[name] and (match := _COLLECTIVE.search(line)):
                found.append(
                    Collective(match["kind"], _delivered_bytes(match), times[name], is_exact[name])
                )
    return found[::-1]


def _num_trips(line: str) -> int:
    """Of a loop that says so; else 1."""
    match = _TRIPS.search(line)
    return int(match[1]) if match else 1


def _taken(line: str, delivered: collections.Counter[str]) -> list[str]:
    """The computations that an instruction runs."""
    names = [
        name
        for called in _CALLED.finditer(line)
        for name in called["names"].replace("%", "").split(", ")
    ]
    return [max(names, key=delivered.__getitem__)] if " conditional(" in line else names


def collective_bytes(hlo: str) -> dict[str, list[int]]:
    """Bytes that each collective of a compiled module delivers on one device, by kind; a loop's body counts once.

    Args:
        hlo: text of the compiled module.
    """
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for match in _COLLECTIVE.finditer(hlo):
        found[match["kind"]].append(_delivered_bytes(match))
    return found


def _delivered_bytes(collective: re.Match) -> int:
    """Of the results alone: the type of an asynchronous start also has the operands."""
    result = collective["type"]
    if result.startswith("(("):
        return sum(map(_num_bytes, _ARRAY.finditer(result.split("), ", 1)[-1])))
    arrays = list(_ARRAY.finditer(result))
    if (
        collective["start"]
        and collective["kind"] in ("all-gather", "collective-permute")
        and len(arrays) > 1
    ):
        arrays = arrays[1:2]  # (operand, result, perhaps a context of integers)
    return sum(map(_num_bytes, arrays))


def _num_bytes(array: re.Match) -> int:
    return BYTES[array["type"]] * math.prod(int(size) for size in array["shape"].split(",") if size)
