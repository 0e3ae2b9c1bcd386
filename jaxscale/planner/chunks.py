"""The modelled memory of a step whose layers run in chunks, on the device and on its host.

Counts the arrays that `parallel.sequence.fpdt` holds at its fullest moment, in a feed-forward's
backward, attention's or the loss's, and what every step holds; docs/long_sequences.md says how far
it is off.

Source: Yao et al. 2024, FPDT (arXiv 2408.16978), table 2, whose counts for GELU and multi-head
    attention are taken again here for gated feed-forwards and grouped queries.
"""

import dataclasses
from collections.abc import Callable

from jaxscale.models.config import AttentionConfig, LayerConfig, ModelConfig
from jaxscale.parallel.sequence.fpdt.strategy import DEFAULT_CHUNK_TOKENS, FullyPipelined
from jaxscale.parallel.sequence.ulysses import num_spread
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.state import StateBytes

ACCUMULATED = 4  # bytes of an element that is added up
# Arrays of a piece in a gated feed-forward's backward: gate, up, their product and their gradients.
HIDDEN_ARRAYS = 6


@dataclasses.dataclass(frozen=True)
class ChunkedMemory:
    """Bytes of one device and of its share of the host.

    Args:
        device: by name, at the fullest moment.
        host: by name.
    """

    device: dict[str, float]
    host: dict[str, float]

    @property
    def on_device(self) -> float:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def on_host(self) -> float:
        """Bytes in the host's memory."""
        return sum(self.host.values())


def chunked_memory(
    job: Job,
    layout: Layout,
    state: StateBytes,
    strategy: FullyPipelined,
) -> ChunkedMemory:
    """The memory of a step.

    Args:
        job: what is trained.
        layout: how it is spread.
        state: its parameters under the layout's mesh.
        strategy: where what is kept rests.
    """
    counts = _Counts(job, layout, strategy)
    kept = {
        "groups' inputs": counts.group_inputs,
        "inputs": counts.inputs,
        "attention's outputs": counts.outputs,
        "chunks": counts.waiting,
    }
    on_host = {name: placed.host for name, placed in kept.items()}
    moments = state.moments
    if layout.mesh.is_optimizer_on_host:
        on_host["moments"] = moments
        moments = moments / 8
    device = {
        "parameters": state.parameters,
        "moments": moments,
        "gradients": state.gradients + state.largest * ACCUMULATED,
        "gathered": _gathered(job, layout, state, counts.are_keys_here),
        "residual": counts.residual,
        "work": counts.work,
    }
    waiting = kept["chunks"].device
    of_layers = sum(device[name] for name in ("gradients", "gathered", "residual", "work"))
    of_loss = counts.loss + state.outside * ACCUMULATED
    device["work"] += max(of_loss - of_layers - waiting, 0)
    device |= {name: placed.device for name, placed in kept.items()}
    return ChunkedMemory(device, on_host)


def _gathered(
    job: Job,
    layout: Layout,
    state: StateBytes,
    are_keys_here: bool,
) -> float:
    """Parameters of the layer at work under ZeRO-3, and what is in no layer with its gradients.

    The latter belongs to the loss, and counts where layers leave it room. Where keys lie on the
    device, the fullest moment is in a layer's backward, while those gradients wait as they were
    added up, in place of the shares that are counted with all gradients.
    """
    mesh = layout.mesh
    if mesh.zero < 3:
        return 0.0
    layer = state.largest * job.width
    num_shares = mesh.data * mesh.sequence
    if are_keys_here:
        return layer + state.outside * (ACCUMULATED - job.width / num_shares)
    if num_shares == 1:
        return layer
    return layer + state.outside * (2 * job.width + ACCUMULATED)


@dataclasses.dataclass(frozen=True)
class _Placed:
    """Bytes of one kind on the device and on the host."""

    device: float = 0.0
    host: float = 0.0

    @classmethod
    def at(cls, place: str, size: float) -> "_Placed":
        return cls(host=size) if place == "host" else cls(device=size)


@dataclasses.dataclass(frozen=True)
class _Counts:
    """What chunks hold, in bytes on one device."""

    job: Job
    layout: Layout
    strategy: FullyPipelined

    @property
    def tokens(self) -> float:
        """Own tokens."""
        mesh = self.layout.mesh
        return self.layout.rows(self.job) * self.job.length / (mesh.sequence * mesh.tensor)

    @property
    def model(self) -> ModelConfig:
        return self.job.model

    @property
    def attention(self) -> AttentionConfig:
        """Of the widest layer."""
        return max((layer.attention for layer in self.model.layers), key=_width)

    @property
    def num_key_heads(self) -> int:
        """Kv heads of all devices, with the copies that the exchange and a tensor group make."""
        tensor, heads = self.layout.mesh.tensor, self.attention
        own_kv = max(heads.num_kv_heads // tensor, 1)
        return tensor * num_spread(heads.num_heads // tensor, own_kv, self.layout.mesh.sequence)

    @property
    def are_keys_here(self) -> bool:
        """Whether keys and values of the layer at work lie on the device, and no queries wait."""
        return self.strategy.chunks == "device"

    @property
    def residual(self) -> float:
        """The residual's cotangent and the input of the layer at work, once it has come.

        Beside chunks on the host the loss is fuller: the residual and its gradient, in chunks and
        joined.
        """
        return (2 if self.are_keys_here else 4) * self.of_input

    @property
    def of_input(self) -> float:
        """One layer's input."""
        return self.tokens * self.model.model_dim * self.job.width

    @property
    def kept_layers(self) -> tuple[LayerConfig, ...]:
        """Those whose inputs and outputs are kept at once: all, or those of one group."""
        every = self.job.execution.checkpoint_every
        return self.model.layers if every == 1 else every * self.model.pattern

    @property
    def group_inputs(self) -> _Placed:
        """Inputs of groups of layers until their backward."""
        execution = self.job.execution
        if execution.checkpoint_every == 1:
            return _Placed()
        num = self.model.num_periods // execution.checkpoint_every
        return _Placed.at(execution.checkpoint_place, num * self.of_input)

    @property
    def inputs(self) -> _Placed:
        """Layers' inputs until their backward."""
        num = len(self.kept_layers)
        if self.strategy.inputs == "device":
            return _Placed(device=num * self.of_input)
        of_chunk = self.of_input * self.strategy.chunk_tokens / self.job.length
        here = min(self.strategy.device_input_bytes // of_chunk * of_chunk, self.of_input)
        return _Placed(num * here, num * (self.of_input - here))

    @property
    def outputs(self) -> _Placed:
        """Attention's outputs and lse until their backward."""
        sizes = [
            _width(layer.attention) * self.job.width + layer.attention.num_heads * ACCUMULATED
            for layer in self.kept_layers
        ]
        if self.strategy.attention == "nowhere":
            # Made again, those of one layer rest on the device, or on the host before queries wait.
            return _Placed(device=max(sizes) * self.tokens if self.are_keys_here else 0)
        return _Placed.at(self.strategy.attention, sum(sizes) * self.tokens)

    @property
    def waiting(self) -> _Placed:
        """What one layer holds of all its chunks.

        On the host these are in the backward q, do and dq, of which the first never waits and one
        is at work or on its way, or in the forward k and v. On the device they are k and v with
        their gradients, as they are added up and as the kernel gives them.
        """
        chunk = self.strategy.chunk_tokens / self.job.length
        keys = 2 * self.num_key_heads * self.attention.head_dim
        if self.are_keys_here:
            return _Placed(device=keys * (2 * self.job.width + ACCUMULATED) * self.tokens)
        queries = _width(self.attention) * (2 * self.job.width + ACCUMULATED)
        of_token = max(queries * max(1 - 2 * chunk, 0), keys * self.job.width * (1 - chunk))
        return _Placed(host=of_token * self.tokens)

    @property
    def loss(self) -> float:
        """Of one of its chunks logits with their gradient, and thrice the residual.

        Where the loss has few chunks it is fuller than a layer.
        """
        logits = self.tokens * self.model.vocab_size * self.job.width
        return 2 * logits / self.job.execution.num_loss_chunks + 3 * self.of_input

    @property
    def work(self) -> float:
        """A chunk at work: attention's backward, or a piece's feed-forward."""
        tokens = self.tokens * self.strategy.chunk_tokens / self.job.length
        heads, width = _width(self.attention), self.job.width
        # q, do and dq of this step and, if they come from the host, of the next one; part of dq, or
        # dq as it is projected back.
        queries = 2 * width + ACCUMULATED
        attention = heads * (queries + width if self.are_keys_here else 2 * (queries + ACCUMULATED))
        hidden = max(layer.feed_forward.dim for layer in self.model.layers)
        piece = HIDDEN_ARRAYS * hidden * width / self.strategy.num_pieces
        if self.are_keys_here and self.layout.mesh.sequence > 1:
            # Of the chunk after it the input, as it is and normed, and the gradients on their way.
            keys = 2 * self.num_key_heads * self.attention.head_dim
            piece += (2 * self.model.model_dim + heads + keys) * width
        # x, o, dy and their gradients, and o of the next chunk.
        num_around = 2 if self.are_keys_here else 4
        around = num_around * (self.model.model_dim + heads) * width
        return tokens * (around + max(attention, piece))


def _width(attention: AttentionConfig) -> int:
    return attention.num_heads * attention.head_dim


def longest_length(
    needs: Callable[[int], tuple[float, float]],
    step: int,
    *,
    device_bytes: float,
    host_bytes: float = float("inf"),
) -> int:
    """The most tokens of a row, a multiple of `step`, that fit; 0 if not even one step does.

    Args:
        needs: length -> bytes on a device and on its share of the host, the more the longer.
        step: tokens.
        device_bytes, host_bytes: that are there.
    """

    def fits(num_steps: int) -> bool:
        on_device, on_host = needs(num_steps * step)
        return on_device <= device_bytes and on_host <= host_bytes

    return _largest(fits) * step


def suggested_chunk(
    job: Job,
    layout: Layout,
    state: StateBytes,
    strategy: FullyPipelined,
    *,
    device_bytes: float,
) -> int | None:
    """The largest chunk that divides the sequence and fits; None if none does.

    It is at most the default or a quarter of the sequence. Larger ones take more of the device, and
    a program of many chunks takes long to compile; see docs/long_sequences.md.
    """
    mesh = layout.mesh
    share = mesh.sequence * mesh.tensor * strategy.num_pieces
    largest = max(job.length // 4, min(DEFAULT_CHUNK_TOKENS, job.length))
    for chunk in range(largest, 0, -1):
        if job.length % chunk or chunk % share:
            continue
        other = dataclasses.replace(strategy, chunk_tokens=chunk)
        if chunked_memory(job, layout, state, other).on_device <= device_bytes:
            return chunk
    return None


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, given that all smaller ones do."""
    above = 1
    while fits(above):
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        if fits(middle):
            below = middle
        else:
            above = middle
    return below
