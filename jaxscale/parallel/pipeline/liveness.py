"""Slots by liveness: as few as the stages of a pipeline schedule need at any time."""

import heapq

import numpy as np

NONE = -1  # no tick, no micro-batch, no chunk, no slot


def assign_slots(
    filled: np.ndarray,
    read: np.ndarray,
    num_stages: int,
) -> tuple[np.ndarray, int]:
    """The slot that holds each tensor from the tick that fills it to the tick of its last use.

    Args:
        filled, read: ticks [v p, m] of a tensor's first and last use; a slot is free again in the
            tick after `read`.
        num_stages: p; virtual stages with the same remainder by p share slots.
    Returns:
        (slots [v p, m], NONE for what is never filled; how many the fullest stage needs).
    """
    slots = np.full(filled.shape, NONE)
    most = 0
    for stage in range(num_stages):
        free: list[int] = []  # a heap, so that the lowest free slot is taken
        in_use: list[tuple[int, int]] = []  # a heap of (tick of the last read, slot)
        num_slots = 0
        for tick, virtual, microbatch in _fills(filled, stage, num_stages):
            while in_use and in_use[0][0] < tick:
                _, slot = heapq.heappop(in_use)
                heapq.heappush(free, slot)
            if not free:
                heapq.heappush(free, num_slots)
                num_slots += 1
            slot = heapq.heappop(free)
            slots[virtual, microbatch] = slot
            heapq.heappush(in_use, (read[virtual, microbatch], slot))
        most = max(most, num_slots)
    return slots, most


def _fills(
    filled: np.ndarray,
    stage: int,
    num_stages: int,
) -> list[tuple[int, int, int]]:
    """(tick, virtual stage, micro-batch) of each tensor that a stage gets, in order of ticks."""
    num_virtual, num_microbatches = filled.shape
    found = []
    for virtual in range(stage, num_virtual, num_stages):
        for microbatch in range(num_microbatches):
            tick = filled[virtual, microbatch]
            if tick != NONE:
                found.append((tick, virtual, microbatch))
    return sorted(found)
