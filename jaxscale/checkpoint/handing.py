"""Arrays from one process to another without a disk: each hands out the boxes that it holds.

Who asks merges what several processes hold as the ranks of any checkpoint are merged. So a training
on a mesh of processes hands its weights to a server on another mesh.

A request is a line of JSON. The answer is a line of JSON, then the bytes that it announces.
"""

import dataclasses
import json
import socket
import socketserver
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.checkpoint.boxes import Merged, Placement, box_of
from jaxscale.types import InputError, RunError

LOOPBACK = "127.0.0.1"
TIMEOUT_S = 60.0
POLL_S = 0.1  # within which closing is noticed
Address = tuple[str, int]
Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Box:
    """What a process holds of an array."""

    path: str
    shape: Sizes
    dtype: str
    corner: Sizes
    sizes: Sizes

    @classmethod
    def of(cls, path: str, shape: Sizes, dtype: str, corner: Sizes, sizes: Sizes) -> "_Box":
        """One from JSON, where tuples are lists."""
        return cls(path, tuple(shape), dtype, tuple(corner), tuple(sizes))

    @property
    def whole(self) -> tuple[Sizes, str]:
        """Shape and type of the array."""
        return self.shape, self.dtype

    def placement(self, process: "_Process", number: int) -> Placement:
        """Where it lies in the array, to be asked for by its number."""
        return Placement(
            part=_Part(process, number, self.sizes, jnp.dtype(self.dtype)),
            reads=(0,) * len(self.sizes),
            starts=self.corner,
            sizes=self.sizes,
            steps=(1,) * len(self.sizes),
            origin=process.name,
        )


class Handing:
    """Answers whoever asks for what this process holds of arrays, until it is closed.

    The arrays must not be donated meanwhile. There is no password: another `host` than this machine
    is for networks in which everybody may read them.

    Args:
        arrays: by path.
        host: on which it listens.
    """

    def __init__(self, arrays: Mapping[str, jax.Array], *, host: str = LOOPBACK):
        self._held: list[jax.Array] = []
        self._boxes: list[dict[str, Any]] = []
        for path, array in arrays.items():
            if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
                array = jax.random.key_data(array)
            dtype = np.dtype(array.dtype).name
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    corner, sizes = box_of(shard.index, array.shape)
                    box = _Box(path, array.shape, dtype, corner, sizes)
                    self._held.append(shard.data)
                    self._boxes.append(dataclasses.asdict(box))
        self._server = _Server((host, 0), self._answer)
        self.address: Address = self._server.server_address[:2]
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": POLL_S},
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: dict[str, Any]) -> bytes:
        """What is sent for one request."""
        if "number" not in request:
            return _line({"boxes": self._boxes, "bytes": 0})
        held = self._held[request["number"]]
        index = tuple(slice(*ends) for ends in request["index"])
        content = np.asarray(held[index]).tobytes()
        return _line({"bytes": len(content)}) + content


class HandedArrays:
    """What processes hand out; a `Source`.

    Args:
        addresses: of all processes that hold parts.
        timeout_s: for an answer.
    """

    def __init__(self, addresses: Sequence[Address], *, timeout_s: float = TIMEOUT_S):
        self._processes = [_Process(address, timeout_s) for address in addresses]

    def leaves(self) -> Mapping[str, Merged]:
        """Each array by its path.

        Raises:
            InputError: the parts do not make up the arrays.
            RunError: a process does not answer.
        """
        found: dict[str, _Box] = {}
        placements: dict[str, list[Placement]] = {}
        for process in self._processes:
            answer, _ = process.ask({})
            for number, fields in enumerate(answer["boxes"]):
                box = _Box.of(**fields)
                first = found.setdefault(box.path, box)
                if box.whole != first.whole:
                    expected = f"{first.whole}, as another process has it"
                    raise InputError(box.path, box.whole, expected)
                placement = box.placement(process, number)
                placements.setdefault(box.path, []).append(placement)
        merged = {}
        for path, box in found.items():
            copy = tuple(placements[path])
            merged[path] = Merged(path, box.shape, jnp.dtype(box.dtype), (copy,))
        return merged


class _Part:
    """The box that a process holds of an array; a `LazyArray`."""

    def __init__(self, process: "_Process", number: int, shape: Sizes, dtype: np.dtype):
        self._process = process
        self._number = number
        self.shape = shape
        self.dtype = dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Asks for one box."""
        corner, sizes = box_of(index, self.shape)
        ends = [(start, start + size) for start, size in zip(corner, sizes)]
        _, content = self._process.ask({"number": self._number, "index": ends})
        return np.frombuffer(content, self.dtype).reshape(sizes)


class _Process:
    """Asks one process; each thread has a connection of its own."""

    def __init__(self, address: Address, timeout_s: float):
        self._address = address
        self._timeout_s = timeout_s
        self._own = threading.local()
        self.name = f"the process at {address[0]}:{address[1]}"

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The answer to a request, and the bytes after it."""
        try:
            if not hasattr(self._own, "file"):
                connected = socket.create_connection(self._address, self._timeout_s)
                with connected:
                    self._own.file = connected.makefile("rwb")
            file = self._own.file
            file.write(_line(request))
            file.flush()
            answer = json.loads(file.readline())
            content = file.read(answer["bytes"])
        except (OSError, ValueError) as error:
            raise RunError(f"{self.name} does not answer: {error}") from error
        if len(content) != answer["bytes"]:
            raise RunError(f"{self.name} broke off")
        return answer, content


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, address: Address, answer: Any):
        super().__init__(address, _Connection)
        self.answer = answer


class _Connection(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        """Answers line after line, until the other side hangs up."""
        for line in self.rfile:
            self.wfile.write(self.server.answer(json.loads(line)))


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
