"""Pipeline schedules as data: what each stage does in each tick, and which slot holds each tensor.

There are three operations, each of one micro-batch through one chunk of the layers: the forward,
the backward and the weight gradient. Most schedules do the last in the backward. One splits it off:
its backward makes the input's gradient only, for which the previous stage waits.

In a tick a stage first stores what its neighbours sent, then does at most one forward, at most one
backward and at most one weight gradient, in this order. Then activations go to the next stage and
cotangents to the previous one. The forward of the last chunk also computes the loss and its
cotangent, so that the backward of that micro-batch may follow in the same tick.

Letters are those of Narayanan et al. 2021 (arXiv 2104.04473): p stages with v chunks each and m
micro-batches. Chunk c of stage s is virtual stage c p + s: after chunk c of the last stage, a
micro-batch goes on in chunk c + 1 of stage 0. A schedule follows from the ticks of its operations,
arrays [v p, m] indexed by virtual stage and micro-batch.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxscale.parallel.mesh import SCHEDULES, nearest_multiples
from jaxscale.parallel.pipeline.liveness import NONE, assign_slots
from jaxscale.types import InputError, check_choice, check_positive


class Rows(NamedTuple):
    """What a stage must know in a tick: int32 arrays [ticks, p], NONE where there is nothing to do.

    Args:
        forward, forward_chunk: micro-batch and chunk of the forward.
        backward, backward_chunk: of the backward.
        weight, weight_chunk: of the weight gradient; NONE everywhere unless it is split off.
        activation_store: activation slot for what the previous stage sent.
        activation_read: activation slot that the forward reads; NONE in the first virtual stage,
            which embeds tokens.
        residual_store, residual_read: residual slot that the forward fills and the backward reads.
            If the weight gradient is split off, the backward adds what that needs.
        residual_weight: residual slot that the weight gradient reads.
        cotangent_store: cotangent slot for what the next stage sent.
        cotangent_own: cotangent slot that the forward of the last virtual stage fills, from the
            loss.
        cotangent_read: cotangent slot that the backward reads.
    """

    forward: np.ndarray
    forward_chunk: np.ndarray
    backward: np.ndarray
    backward_chunk: np.ndarray
    weight: np.ndarray
    weight_chunk: np.ndarray
    activation_store: np.ndarray
    activation_read: np.ndarray
    residual_store: np.ndarray
    residual_read: np.ndarray
    residual_weight: np.ndarray
    cotangent_store: np.ndarray
    cotangent_own: np.ndarray
    cotangent_read: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A schedule of p stages with v chunks each and m micro-batches.

    A slot holds its tensor from the tick that fills it to the tick that reads it last, both
    included.

    Args:
        name: one of SCHEDULES.
        num_stages: p.
        num_chunks: v.
        num_microbatches: m.
        rows: what happens, by tick and stage.
        num_activation_slots, num_residual_slots, num_cotangent_slots: what the fullest stage needs
            of each kind; all chunks of a stage share them.
        is_split: whether the weight gradient is split off the backward.
    """

    name: str
    num_stages: int
    num_chunks: int
    num_microbatches: int
    rows: Rows
    num_activation_slots: int
    num_residual_slots: int
    num_cotangent_slots: int
    is_split: bool

    @property
    def num_ticks(self) -> int:
        """Number of ticks, each of which ends in one exchange."""
        return self.rows.forward.shape[0]


def make_schedule(
    name: str,
    num_stages: int,
    num_chunks: int,
    num_microbatches: int,
) -> Schedule:
    """The schedule of a name in SCHEDULES.

    Args:
        name: one of SCHEDULES.
        num_stages: p.
        num_chunks: v, above 1 for "interleaved" only.
        num_microbatches: m.
    Raises:
        InputError: a count is not positive, v does not suit the schedule, or m does not suit v.
    """
    check_choice("MeshConfig.schedule", name, SCHEDULES)
    if name == "interleaved":
        return interleaved(num_stages, num_chunks, num_microbatches)
    if num_chunks != 1:
        raise InputError("MeshConfig.num_chunks", num_chunks, '1 unless schedule is "interleaved"')
    makers = {"gpipe": gpipe, "1f1b": one_f_one_b, "zero_bubble": zero_bubble}
    return makers[name](num_stages, num_microbatches)


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards.

    The first micro-batch's backward comes first, so that gradients add up in the same order as in
    the other schedules.

    Source: Huang et al. 2019 (arXiv 1811.06965), section 2.3: bubble (p - 1) / (m + p - 1).
    Cost: m residual slots.
    """
    stage, microbatch = _grid(num_stages, num_microbatches)
    forward = stage + microbatch
    # 1F1B's backward, delayed by the ticks from the last stage's first forward to its last: the
    # first backward follows that one in the same tick.
    delay = num_microbatches - 1
    backward = 2 * (num_stages - 1) - stage + microbatch + delay
    return _schedule("gpipe", num_stages, forward, backward)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """Each backward as soon as it is possible.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.1, its PipeDream-Flush: bubble
        (p - 1) / (m + p - 1).
    Cost: min(m, 2 p - 1) residual slots. A stage waits for its neighbours once a tick, so it gets a
        micro-batch back after 2 (p - 1) ticks. The paper's p micro-batches in flight would need an
        exchange after each forward and one after each backward, where all wait for the slower of
        the two.
    """
    forward, backward = _one_f_one_b_ticks(num_stages, num_microbatches)
    return _schedule("1f1b", num_stages, forward, backward)


def interleaved(
    num_stages: int,
    num_chunks: int,
    num_microbatches: int,
) -> Schedule:
    """1F1B over v chunks a stage.

    Each group of p micro-batches passes all chunks before the next group begins.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.2: bubble (p - 1) / (v m + p - 1).
    Raises:
        InputError: m % p != 0 with v > 1.
    Cost: at most v p + p - 1 residual slots of 1 / v of a stage; v times the exchanges of 1F1B.
    """
    check_positive("MeshConfig.num_chunks", num_chunks)
    virtual, microbatch = _grid(num_stages, num_microbatches, num_chunks)
    if num_chunks > 1:
        _check_groups(num_microbatches, num_stages)
    group, place_in_group = microbatch // num_stages, microbatch % num_stages
    start = group * num_stages * num_chunks + place_in_group
    num_virtual = num_stages * num_chunks
    backward = start + 2 * (num_virtual - 1) - virtual
    return _schedule("interleaved", num_stages, start + virtual, backward)


def _check_groups(num_microbatches: int, num_stages: int) -> None:
    if rest := num_microbatches % num_stages:
        equation = "num_microbatches % pipeline == 0 for the interleaved schedule"
        here = f"but {num_microbatches} % {num_stages} = {rest}"
        nearest = nearest_multiples(num_microbatches, num_stages)
        expected = f"{equation}, {here}; nearest: {nearest}"
        raise InputError("TrainConfig.num_microbatches", num_microbatches, expected)


def zero_bubble(num_stages: int, num_microbatches: int) -> Schedule:
    """ZB-H1: splits off the weight gradient, for which nobody waits, to fill idle ticks.

    Up to the last forward of any stage, forwards and backwards come when 1F1B has them. A stage
    does a weight gradient in every tick between the first backward and the last forward of stage 0,
    and after that where it has no forward left while others have. Once all forwards are done, a
    tick of a backward (or of a weight gradient where no backward is left) alternates with one of a
    weight gradient.

    Source: Qi et al. 2023 (arXiv 2401.10241), section 2.1: idle time (p - 1)(T_F + T_B - T_W), here
        for T_W <= T_F, T_W <= T_B and m >= 2 (p - 1); more for fewer micro-batches, never more than
        1F1B's.
    Cost: min(m, 2 p - 1) residual slots, held from the forward to the weight gradient, as many as
        1F1B's stage 0 holds from forward to backward, each with room for what the backward leaves
        for the weight gradient.
    """
    forward, backward = _one_f_one_b_ticks(num_stages, num_microbatches)
    last = num_microbatches + num_stages - 1  # the first tick without any forward
    # From there on every second tick is left to weight gradients.
    backward = backward + np.maximum(backward - last, 0)
    first = 2 * (num_stages - 1)
    weight = []
    for stage in range(num_stages):
        ticks = _weight_ticks(forward[stage], backward[stage], first, last)
        weight.append(ticks)
    return _schedule("zero_bubble", num_stages, forward, backward, np.stack(weight))


def duration(
    schedule: Schedule,
    forward: ArrayLike,
    backward: ArrayLike,
    weight: ArrayLike,
    head: float | None = None,
) -> float:
    """Time of a step: a stage begins a tick when it and its neighbours have ended the one before.

    Args:
        schedule: p stages with v chunks.
        forward, backward, weight: seconds of the forward, of the input's gradient and of the
            weights' gradient, for one micro-batch through one chunk: a number, [p], or [v, p].
            Unless the schedule splits the two gradients, its backward takes the time of both.
        head: seconds of what all stages do together, waiting for one another, once the last has
            ended a micro-batch's forward; None where they do not.
    Returns:
        seconds until the last stage has ended. Of the exchanges only the waiting counts.
    """
    is_ring = schedule.num_chunks > 1  # the last stage sends to stage 0
    has_head = schedule.rows.cotangent_own[:, -1] != NONE
    ended = np.zeros(schedule.num_stages)
    ticks = _tick_seconds(schedule, forward, backward, weight)
    for is_shared, before, after in zip(has_head, *ticks, strict=True):
        previous, following = np.roll(ended, 1), np.roll(ended, -1)
        if not is_ring:
            previous[0] = following[-1] = 0.0
        neighbours = np.maximum(previous, following)
        ended = np.maximum(ended, neighbours) + before
        if is_shared and head is not None:
            ended[:] = ended.max() + head
        ended += after
    return float(ended.max())


def bubble(
    schedule: Schedule,
    forward: ArrayLike = 1.0,
    backward: ArrayLike = 1.0,
    weight: ArrayLike = 1.0,
) -> float:
    """Share of the stages' time that is idle; arguments as of `duration`."""
    busy = sum(each.sum() for each in _tick_seconds(schedule, forward, backward, weight))
    total = schedule.num_stages * duration(schedule, forward, backward, weight)
    return float(1 - busy / total)


def _tick_seconds(
    schedule: Schedule,
    forward: ArrayLike,
    backward: ArrayLike,
    weight: ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds [ticks, p] that each stage works in each tick: in its forward, and after it."""
    rows, shape = schedule.rows, (schedule.num_chunks, schedule.num_stages)
    if not schedule.is_split:
        backward = np.add(backward, weight)

    def seconds(chunk: np.ndarray, cost: ArrayLike) -> np.ndarray:
        by_chunk = np.broadcast_to(np.asarray(cost, float), shape)
        return np.where(chunk == NONE, 0.0, by_chunk[chunk, np.arange(schedule.num_stages)])

    after = seconds(rows.backward_chunk, backward) + seconds(rows.weight_chunk, weight)
    return seconds(rows.forward_chunk, forward), after


def _grid(
    num_stages: int,
    num_microbatches: int,
    num_chunks: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the virtual stages [v p, 1] and of the micro-batches [1, m]."""
    check_positive("MeshConfig.pipeline", num_stages)
    check_positive("TrainConfig.num_microbatches", num_microbatches)
    virtual = np.arange(num_stages * num_chunks)
    microbatch = np.arange(num_microbatches)
    return virtual[:, None], microbatch[None, :]


def _one_f_one_b_ticks(num_stages: int, num_microbatches: int) -> tuple[np.ndarray, np.ndarray]:
    """Ticks [p, m] of forward and backward: each takes a micro-batch one stage on, or back."""
    stage, microbatch = _grid(num_stages, num_microbatches)
    forward = stage + microbatch
    backward = 2 * (num_stages - 1) - stage + microbatch
    return forward, backward


def _weight_ticks(
    forward: np.ndarray,
    backward: np.ndarray,
    first: int,
    last: int,
) -> np.ndarray:
    """Ticks [m] of a stage's weight gradients: the earliest that cost the pipeline least.

    Args:
        forward, backward: ticks [m] of the stage's forwards and backwards.
        first: tick of stage 0's first backward, which a weight gradient before it would delay.
        last: first tick without any forward.
    """
    num = len(forward)
    ticks = np.arange(last + 2 * first + num + 2)
    is_steady = (ticks >= first) & (ticks < num)
    has_no_forward = ~np.isin(ticks, forward)
    has_no_backward = ~np.isin(ticks, backward)
    is_free = np.where(ticks < last, is_steady | has_no_forward, has_no_backward)
    free = ticks[is_free]
    found: list[int] = []
    for ready in backward:
        earliest = max(ready, found[-1] + 1) if found else ready
        index = np.searchsorted(free, earliest)
        found.append(free[index])
    return np.array(found)


def _schedule(
    name: str,
    num_stages: int,
    forward: np.ndarray,
    backward: np.ndarray,
    weight: np.ndarray | None = None,
) -> Schedule:
    """Assigns slots to a schedule.

    Args:
        name: one of SCHEDULES.
        num_stages: p.
        forward, backward: ticks [v p, m] of both.
        weight: ticks [v p, m] of the weight gradients; None unless the schedule splits them off.
    """
    # What arrives was sent one tick before, by the virtual stage before or after. The first virtual
    # stage reads no activation, and the last makes its cotangent itself, in its forward.
    no_activation = np.full_like(forward[:1], NONE)
    activation_at = np.vstack([no_activation, forward[:-1] + 1])
    cotangent_at = np.vstack([backward[1:] + 1, forward[-1:]])
    is_split = weight is not None
    if weight is None:
        weight = np.full_like(backward, NONE)
    last_use = np.maximum(backward, weight)
    activation, num_activation = assign_slots(activation_at, forward, num_stages)
    cotangent, num_cotangent = assign_slots(cotangent_at, backward, num_stages)
    residual, num_residual = assign_slots(forward, last_use, num_stages)

    num_virtual, num_microbatches = forward.shape
    virtual, microbatch = np.indices(forward.shape)
    chunk, stage = virtual // num_stages, virtual % num_stages
    num_ticks = 1 + last_use.max()
    is_last = virtual == num_virtual - 1

    def column(ticks: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Each value [v p, m] at its tick and stage, [ticks, p]."""
        found = np.full((num_ticks, num_stages), NONE, np.int32)
        is_any = ticks != NONE
        found[ticks[is_any], stage[is_any]] = values[is_any]
        return found

    rows = Rows(
        forward=column(forward, microbatch),
        forward_chunk=column(forward, chunk),
        backward=column(backward, microbatch),
        backward_chunk=column(backward, chunk),
        weight=column(weight, microbatch),
        weight_chunk=column(weight, chunk),
        activation_store=column(activation_at, activation),
        activation_read=column(forward, activation),
        residual_store=column(forward, residual),
        residual_read=column(backward, residual),
        residual_weight=column(weight, residual),
        cotangent_store=column(np.where(is_last, NONE, cotangent_at), cotangent),
        cotangent_own=column(np.where(is_last, cotangent_at, NONE), cotangent),
        cotangent_read=column(backward, cotangent),
    )
    return Schedule(
        name=name,
        num_stages=num_stages,
        num_chunks=num_virtual // num_stages,
        num_microbatches=num_microbatches,
        rows=rows,
        num_activation_slots=num_activation,
        num_residual_slots=num_residual,
        num_cotangent_slots=num_cotangent,
        is_split=is_split,
    )
