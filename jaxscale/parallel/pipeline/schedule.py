"""Pipeline schedules as data: what each stage does in each tick, and in which slot each tensor waits.

A stage's tick is, in this order: store what its neighbours sent, at most one F (forward of a
micro-batch through a chunk), at most one B (backward), at most one W (weight gradient, where a
schedule splits it from B); then activations go to the next stage and cotangents to the previous
one. F of the last chunk also makes the cotangent of its own loss, so B of that micro-batch may
follow in the same tick.

Chunk v of stage s is virtual stage k = v S + s, so that the layers pass S - 1 -> 0 between two
chunks. A schedule is made of the ticks of F, B and W, arrays [V S, M] indexed by virtual stage and
micro-batch; the rest follows from them.
"""

import dataclasses
import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxscale.parallel.mesh import SCHEDULES, nearest_multiples
from jaxscale.types import InputError, check_choice, check_positive

NONE = -1  # no micro-batch, no chunk, no slot


class Rows(NamedTuple):
    """One int32 array [ticks, S] for each thing a stage must know in a tick; NONE where there is nothing to do.

    Args:
        forward, forward_chunk: micro-batch and chunk of F.
        backward, backward_chunk: of B.
        weight, weight_chunk: of W; NONE everywhere where B does both.
        activation_store: activation slot for what the previous stage sent.
        activation_read: activation slot that F reads; NONE in the first virtual stage, which embeds
            tokens.
        residual_store, residual_read: residual slot that F fills and B reads; where W is apart, B
            adds what W needs.
        residual_weight: residual slot that W reads.
        cotangent_store: cotangent slot for what the next stage sent.
        cotangent_own: cotangent slot that F of the last virtual stage fills.
        cotangent_read: cotangent slot that B reads.
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
    """A schedule of S stages with V chunks each and M micro-batches.

    A slot holds its tensor from the tick that fills it to the tick that reads it last, both
    included.

    Args:
        name: one of SCHEDULES.
        num_stages: S.
        num_chunks: V.
        num_microbatches: M.
        rows: what happens, by tick and stage. num_activation_slots, num_residual_slots,
        num_cotangent_slots: what the fullest stage needs of each kind; all
            chunks of a stage share them.
        is_split: whether W is apart from B.
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


def make_schedule(name: str, num_stages: int, num_chunks: int, num_microbatches: int) -> Schedule:
    """The schedule of a name in SCHEDULES.

    Args:
        name: one of SCHEDULES.
        num_stages: S.
        num_chunks: V, above 1 for "interleaved" only.
        num_microbatches: M.
    Raises:
        InputError: a count is not positive, V does not suit the schedule, or M does not suit V.
    """
    check_choice("MeshConfig.schedule", name, SCHEDULES)
    if name == "interleaved":
        return interleaved(num_stages, num_chunks, num_microbatches)
    if num_chunks != 1:
        raise InputError("MeshConfig.num_chunks", num_chunks, '1 unless schedule is "interleaved"')
    return {"gpipe": gpipe, "1f1b": one_f_one_b, "zero_bubble": zero_bubble}[name](
        num_stages, num_microbatches
    )


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, the first micro-batch's first, so that gradients add up as in the others.

    Source: Huang et al. 2019 (arXiv 1811.06965), section 2.3: bubble (S - 1) / (M + S - 1).
    Cost: M residual slots.
    """
    stage, microbatch = _grid(num_stages, num_microbatches)
    all_forward = (
        num_microbatches - 1
    )  # ticks from the last stage's first F to its last, with which B may begin
    forward = stage + microbatch
    backward = 2 * (num_stages - 1) - stage + all_forward + microbatch
    return _schedule("gpipe", num_stages, forward, backward)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """A backward as soon as it can be.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.1, its PipeDream-Flush: bubble (S
        - 1) / (M + S - 1).
    Cost: min(M, 2 S - 1) residual slots. A stage that waits for its neighbours once per F and B
        gets a micro-batch back after 2 (S - 1) ticks; the paper's S micro-batches in flight would
        need an exchange after each F and after each B, where all wait for the slower of the two.
    """
    return _schedule("1f1b", num_stages, *_one_f_one_b_ticks(num_stages, num_microbatches))


def interleaved(num_stages: int, num_chunks: int, num_microbatches: int) -> Schedule:
    """1F1B over V chunks a stage: each group of S micro-batches passes all chunks before the next group begins.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.2: bubble (S - 1) / (V M + S - 1).
    Raises:
        InputError: M % S != 0 with V > 1.
    Cost: at most V S + S - 1 residual slots of 1 / V of a stage; V times the exchanges of 1F1B.
    """
    check_positive("MeshConfig.num_chunks", num_chunks)
    virtual, microbatch = _grid(num_stages, num_microbatches, num_chunks)
    if num_chunks > 1 and num_microbatches % num_stages:
        expected = (
            f"num_microbatches % pipeline == 0 for the interleaved schedule, but {num_microbatches} % {num_stages} = "
            f"{num_microbatches % num_stages}; nearest: {nearest_multiples(num_microbatches, num_stages)}"
        )
        raise InputError("TrainConfig.num_microbatches", num_microbatches, expected)
    start = microbatch // num_stages * num_stages * num_chunks + microbatch % num_stages
    backward = start + 2 * (num_stages * num_chunks - 1) - virtual
    return _schedule("interleaved", num_stages, start + virtual, backward)


def zero_bubble(num_stages: int, num_microbatches: int) -> Schedule:
    """ZB-H1: B gives the input's gradient only, and W, which nobody waits for, fills what would be idle.

    F and B are 1F1B's. W is done in each tick between the first B and the last F of stage 0, then
    where a stage has run out of Fs while others have not. Once all Fs are done, a tick of B, or W
    where no B is left, alternates with a tick of W.

    Source: Qi et al. 2023 (arXiv 2401.10241), section 2.1: idle time (S - 1)(F + B - W), here for W
        <= F, W <= B and M >= 2 (S - 1); more for fewer micro-batches, never more than 1F1B's.
    Cost: min(M, 2 S - 1) residual slots, held from F to W, as many as 1F1B's stage 0 holds from F
        to B, each with room for what B leaves for W.
    """
    forward, backward = _one_f_one_b_ticks(num_stages, num_microbatches)
    last = num_microbatches + num_stages - 1  # the first tick without any F
    backward = backward + np.maximum(backward - last, 0)
    weight = [
        _weight_ticks(f, b, 2 * (num_stages - 1), last)
        for f, b in zip(forward, backward, strict=True)
    ]
    return _schedule("zero_bubble", num_stages, forward, backward, np.stack(weight))


def duration(
    schedule: Schedule, forward: ArrayLike, backward: ArrayLike, weight: ArrayLike
) -> float:
    """Time of a step: a stage begins a tick when it and its neighbours have ended the one before.

    Args:
        schedule: S stages with V chunks.
        forward, backward, weight: seconds of F, of the input's gradient and of the weights'
            gradient, for one micro-batch through one chunk: a number, [S], or [V, S]. Unless the
            schedule splits them, its B takes both.
    Returns:
        seconds until the last stage has ended, of the exchanges only the waiting.
    """
    ended = np.zeros(schedule.num_stages)
    for seconds in _tick_seconds(schedule, forward, backward, weight):
        if schedule.num_chunks > 1:
            before, after = np.roll(ended, 1), np.roll(ended, -1)
        else:
            before, after = np.append(0.0, ended[:-1]), np.append(ended[1:], 0.0)
        ended = np.maximum(ended, np.maximum(before, after)) + seconds
    return float(ended.max())


def bubble(
    schedule: Schedule, forward: ArrayLike = 1.0, backward: ArrayLike = 1.0, weight: ArrayLike = 1.0
) -> float:
    """Share of the stages' time that is idle; arguments as of `duration`."""
    busy = _tick_seconds(schedule, forward, backward, weight).sum()
    return float(1 - busy / (schedule.num_stages * duration(schedule, forward, backward, weight)))


def _tick_seconds(
    schedule: Schedule, forward: ArrayLike, backward: ArrayLike, weight: ArrayLike
) -> np.ndarray:
    """Seconds [ticks, S] that each stage works in each tick."""
    rows, stages = schedule.rows, np.arange(schedule.num_stages)
    backward = backward if schedule.is_split else np.add(backward, weight)
    seconds = np.zeros(rows.forward.shape)
    chunks = (rows.forward_chunk, rows.backward_chunk, rows.weight_chunk)
    for chunk, cost in zip(chunks, (forward, backward, weight), strict=True):
        by_chunk = np.broadcast_to(
            np.asarray(cost, float), (schedule.num_chunks, schedule.num_stages)
        )
        seconds += np.where(chunk == NONE, 0.0, by_chunk[chunk, stages])
    return seconds


def _grid(
    num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the virtual stages [V S, 1] and of the micro-batches [1, M]."""
    check_positive("MeshConfig.pipeline", num_stages)
    check_positive("TrainConfig.num_microbatches", num_microbatches)
    return np.arange(num_stages * num_chunks)[:, None], np.arange(num_microbatches)[None, :]


def _one_f_one_b_ticks(num_stages: int, num_microbatches: int) -> tuple[np.ndarray, np.ndarray]:
    stage, microbatch = _grid(num_stages, num_microbatches)
    return stage + microbatch, 2 * (num_stages - 1) - stage + microbatch


def _weight_ticks(forward: np.ndarray, backward: np.ndarray, first: int, last: int) -> np.ndarray:
    """Ticks [M] of a stage's Ws: the earliest that cost the pipeline least.

    Args:
        forward, backward: ticks [M] of the stage's F and B.
        first: tick of the first B of stage 0: a W earlier on would delay it.
        last: first tick without any F.
    """
    num = len(forward)
    ticks = np.arange(last + 2 * first + num + 2)
    is_steady = (ticks >= first) & (ticks < num)
    is_free = np.where(
        ticks < last, is_steady | ~np.isin(ticks, forward), ~np.isin(ticks, backward)
    )
    free, found = ticks[is_free], []
    for ready in backward:
        earliest = max(ready, found[-1] + 1) if found else ready
        found.append(free[np.searchsorted(free, earliest)])
    return np.array(found)


def _schedule(
    name: str,
    num_stages: int,
    forward: np.ndarray,
    backward: np.ndarray,
    weight: np.ndarray | None = None,
) -> Schedule:
    """Assigns slots to a schedule given as ticks [V S, M] of F, B and, where it splits them, W."""
    activation_at = np.vstack(
        [np.full_like(forward[:1], NONE), forward[:-1] + 1]
    )  # k - 1 sent it one tick before
    cotangent_at = np.vstack([backward[1:] + 1, forward[-1:]])
    activation, num_activation = _assign(activation_at, forward, num_stages)
    cotangent, num_cotangent = _assign(cotangent_at, backward, num_stages)
    is_split = weight is not None
    weight = weight if is_split else np.full_like(backward, NONE)
    residual, num_residual = _assign(forward, np.maximum(backward, weight), num_stages)

    virtual, microbatch = np.indices(forward.shape)
    chunk, num_ticks = virtual // num_stages, 1 + max(backward.max(), weight.max())
    is_last = virtual == len(forward) - 1

    def column(ticks: np.ndarray, values: np.ndarray) -> np.ndarray:
        found = np.full((num_ticks, num_stages), NONE, np.int32)
        is_any = ticks != NONE
        found[ticks[is_any], virtual[is_any] % num_stages] = values[is_any]
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
    counts = (num_activation, num_residual, num_cotangent)
    return Schedule(
        name, num_stages, len(forward) // num_stages, forward.shape[1], rows, *counts, is_split
    )


def _assign(filled: np.ndarray, read: np.ndarray, num_stages: int) -> tuple[np.ndarray, int]:
    """Slots [V S, M] by liveness, and how many the fullest stage needs; NONE for what is never filled.

    Args:
        filled, read: ticks [V S, M] of a tensor's first and last use; a slot is free again in the
            tick after `read`.
        num_stages: S; virtual stages k with the same k % S share slots.
    """
    slots, most = np.full(filled.shape, NONE), 0
    for stage in range(num_stages):
        own = [
            (filled[k, m], k, m)
            for k in range(stage, len(filled), num_stages)
            for m in range(filled.shape[1])
        ]
        free: list[int] = []
        in_use: list[tuple[int, int]] = []  # (tick of the last read, slot)
        num = 0
        for tick, k, m in sorted(entry for entry in own if entry[0] != NONE):
            while in_use and in_use[0][0] < tick:
                heapq.heappush(free, heapq.heappop(in_use)[1])
            if not free:
                heapq.heappush(free, num)
                num += 1
            slots[k, m] = heapq.heappop(free)
            heapq.heappush(in_use, (read[k, m], slots[k, m]))
        most = max(most, num)
    return slots, most
