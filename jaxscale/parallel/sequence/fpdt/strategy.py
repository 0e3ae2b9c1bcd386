"""The strategy of execution that a run names: how a decoder's layer becomes a stream of chunks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention.intervals import IntervalAttention
from jaxscale.ops.backends import ROUTER
from jaxscale.ops.draws import Draws
from jaxscale.parallel.mesh import nearest_divisors
from jaxscale.parallel.sequence.fpdt.cuts import Cuts, tied
from jaxscale.parallel.sequence.fpdt.gradient import stream_layer
from jaxscale.parallel.sequence.fpdt.keys import Intervals
from jaxscale.parallel.sequence.fpdt.stream import STREAM, Places, Stream, Tokens
from jaxscale.types import Array, InputError, Params, check_choice, check_positive, check_types

DEFAULT_CHUNK_TOKENS = 65_536


@dataclasses.dataclass(frozen=True)
class FullyPipelined:
    """Layers chunk by chunk, with what the other chunks need in host memory.

    Source: Yao et al. 2024, FPDT (arXiv 2408.16978), section 5.
    Args:
        chunk_tokens: C, tokens of a chunk over all shares of the sequence.
        num_pieces: of a chunk, for the feed-forward, whose hidden vectors are the widest arrays.
        inputs: where layers' inputs rest until the backward, "host" or "device".
        device_input_bytes: bytes of each layer's input that stay on the device all the same; the
            rest of its chunks go to the host.
        attention: where attention's outputs rest until the backward, "host" or "device"; "nowhere"
            runs attention twice.
        chunks: where chunks of the layer at work rest. "host": keys and values in the forward;
            queries, their gradients and the output's cotangents in the backward. "device": keys,
            values and their gradients, and no queries; the faster where those fit.
    """

    # All else is made again: the layer's parameters as they are gathered and converted.
    kept_names: ClassVar[tuple[str, ...]] = (STREAM, ROUTER)

    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    num_pieces: int = 2
    inputs: str = "host"
    device_input_bytes: int = 0
    attention: str = "host"
    chunks: str = "host"

    def __post_init__(self):
        check_types(self)
        for name in ("chunk_tokens", "num_pieces"):
            check_positive(f"FullyPipelined.{name}", getattr(self, name))
        if self.device_input_bytes < 0:
            given = self.device_input_bytes
            raise InputError("FullyPipelined.device_input_bytes", given, "0 or more")
        check_choice("FullyPipelined.inputs", self.inputs, ("device", "host"))
        check_choice("FullyPipelined.attention", self.attention, ("device", "host", "nowhere"))
        check_choice("FullyPipelined.chunks", self.chunks, ("device", "host"))

    def __call__(
        self,
        layer: Any,
        x: Array,
        context: AttentionContext,
        cache: Any,
        draws: Draws | None,
    ) -> tuple[Array, Any, Any]:
        """As `models.execution.LayerStrategy`.

        Raises:
            InputError: there is a cache, the mask is not a causal one, or lengths do not divide.
        """
        if cache is not None:
            raise InputError("ExecutionConfig.strategy", self, "Whole() where there is a cache")
        cuts, sequence = self._cuts(layer, x, context)
        context = layer.masked(context)
        stream = Stream(
            **_functions(_unnamed(layer), cuts.num_members),
            attention=_attention(layer, x, context),
            chunks=cuts,
            pieces=dataclasses.replace(cuts, num=self.num_pieces),
            places=self._places(x, cuts.num),
            is_exchanged=sequence > 1,
        )
        known = _Known(context.positions, context.lengths, draws)
        tokens = Tokens(known, _intervals(layer, context, cuts))
        x, choices = stream_layer(stream, layer.params, x, tokens)
        return x, None, choices

    @property
    def is_on_device(self) -> bool:
        """Whether nothing rests on the host."""
        return "host" not in (self.inputs, self.attention, self.chunks)

    def check(
        self,
        *,
        length: int,
        sequence: int,
        tensor: int,
    ) -> None:
        """Raises InputError, with the equation that fails, unless the chunks fit.

        Args:
            length: T.
            sequence, tensor: sizes of the mesh's axes.
        """
        share = sequence * tensor * self.num_pieces
        fitting = [c for c in range(share, length + 1, share) if length % c == 0]
        equations = {
            f"sequence_length % chunk_tokens == 0, here {length} % {self.chunk_tokens}": length
            % self.chunk_tokens,
            "chunk_tokens % (sequence * tensor * num_pieces) == 0, here "
            f"{self.chunk_tokens} % ({sequence} * {tensor} * {self.num_pieces})": self.chunk_tokens
            % share,
        }
        nearest = _nearest(fitting, self.chunk_tokens)
        if not fitting:
            pieces = nearest_divisors(length // (sequence * tensor), self.num_pieces)
            nearest = f"none with these num_pieces, but with {pieces}"
        for equation, rest in equations.items():
            if rest:
                expected = f"{equation} = {rest}; nearest: {nearest}"
                raise InputError("FullyPipelined.chunk_tokens", self.chunk_tokens, expected)

    def _cuts(self, layer: Any, x: Array, context: AttentionContext) -> tuple[Cuts, int]:
        """How tokens are cut into chunks, and over how many shares of the sequence they lie."""
        num_rows, num_own, _ = x.shape
        num_known = context.positions.shape[1]
        num_members = num_known // num_own
        if num_members > 1 and num_rows > 1:
            expected = "1 row a device and micro-batch with MeshConfig.tensor > 1"
            raise InputError("FullyPipelined", f"{num_rows} rows", expected)
        whole = jax.eval_shape(layer.operations.collectives.whole_chunk, context.positions)
        length = whole.shape[1]
        sequence = length // num_known
        self.check(length=length, sequence=sequence, tensor=num_members)
        return Cuts(length // self.chunk_tokens, num_members), sequence

    def _places(self, x: Array, num_chunks: int) -> Places:
        bytes_of_chunk = x.size // num_chunks * x.dtype.itemsize
        num_on_device = min(self.device_input_bytes // bytes_of_chunk, num_chunks)
        on_device = ["device"] * num_on_device
        elsewhere = [self.inputs] * (num_chunks - num_on_device)
        # Those that the backward begins with, so that it need not wait for them.
        is_from_last = self.chunks == "device"
        inputs = elsewhere + on_device if is_from_last else on_device + elsewhere
        return Places(tuple(inputs), self.attention, self.chunks)


class _Known(NamedTuple):
    """What the tensor group knows of its tokens.

    Args:
        positions, lengths: as in `AttentionContext`.
        draws: of the tokens.
    """

    positions: Array
    lengths: Array | None
    draws: Draws | None


def _functions(layer: Any, num_members: int) -> dict[str, Callable]:
    """A layer as the functions that `Stream` wants; its heads are shared out among the members."""
    collectives = layer.operations.collectives
    num_heads = layer.config.attention.num_heads // num_members

    def project(params: Params, x: Array, known: _Known) -> tuple[Array, Array, Array]:
        here = dataclasses.replace(layer, params=params)
        _, h = here.enter_attention(x)
        q, k, v = here.qkv(collectives.gather_tokens(h), known.positions, known.lengths)
        return collectives.heads_by_member(q, k, v)

    def leave(o: Array) -> Array:
        return collectives.to_tokens(o, num_heads)

    def finish(
        params: Params,
        x: Array,
        o: Array,
        known: _Known,
        logits: Array | None,
    ) -> tuple[Array, Any]:
        here = dataclasses.replace(layer, params=params)
        if logits is not None:
            here = _with_names(here, functools.partial(_router_again, logits))
        x, h = here.enter_attention(x)
        y = collectives.reduce_scatter_tokens(here.output(o))
        return here.finish(x, h, y, known.draws)

    return dict(project=project, enter=collectives.to_heads, leave=leave, finish=finish)


def _attention(layer: Any, x: Array, context: AttentionContext) -> IntervalAttention:
    heads = (*x.shape[:2], layer.config.attention.num_heads, layer.config.attention.head_dim)
    q = jax.ShapeDtypeStruct(heads, x.dtype)
    return layer.operations.backends.chunk_attention(q, context)


def _intervals(layer: Any, context: AttentionContext, cuts: Cuts) -> Intervals:
    """The keys that each token sees, of the whole sequence in its order."""

    def whole(x: Array) -> Array:
        chunks = [cuts.known(x, i) for i in range(cuts.num)]
        return jnp.concatenate([layer.operations.collectives.whole_chunk(c) for c in chunks], 1)

    segments = None if context.segments is None else whole(context.segments)
    whole_context = dataclasses.replace(
        context, positions=whole(context.positions), segments=segments
    )
    # Tied, or else XLA would work out while it compiles which tiles each pair of chunks sees.
    return tied(Intervals(*whole_context.key_intervals()))


def _unnamed(layer: Any) -> Any:
    """The layer without names for its tensors but the router's logits.

    A stream keeps what it keeps. Where it runs again as a whole, a policy keeps the logits.
    """
    name = layer.operations.backends.name
    return _with_names(layer, lambda path, x: name(path, x) if _is_router(path) else x)


def _is_router(path: str) -> bool:
    return path.rsplit("/", 1)[-1] == ROUTER


def _with_names(layer: Any, name: Callable) -> Any:
    operations = layer.operations
    backends = dataclasses.replace(operations.backends, name=name)
    return dataclasses.replace(layer, operations=dataclasses.replace(operations, backends=backends))


def _router_again(logits: Array, path: str, x: Array) -> Array:
    """The forward's logits in place of those that the backward made again.

    Made again they may differ in the last bit, and a token could be sent to another expert.
    """
    return _replaced(x, logits) if _is_router(path) else x


@jax.custom_vjp
def _replaced(x: Array, value: Array) -> Array:
    """`value`, whose gradient is that of `x`."""
    return value


_replaced.defvjp(lambda x, value: (value, None), lambda _, g: (g, None))


def _nearest(sizes: list[int], given: int) -> str:
    below = [size for size in sizes if size <= given][-1:]
    above = [size for size in sizes if size > given][:1]
    return " or ".join(map(str, below + above))
