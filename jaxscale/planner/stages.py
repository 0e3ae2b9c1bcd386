"""Stages: the dynamic programme over blocks, devices, replicas and micro-batches.

Source: Tanaka et al. 2021, RaNNC (arXiv 2103.16063), its third phase. Here the slowest stage's
forward and backward together are minimised, exactly; any number of replicas is allowed that divides
a micro-batch; and the inputs of all micro-batches in flight count as memory.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxscale.planner.cluster import LATENCY_S, Cluster
from jaxscale.planner.costs import ModelledCosts, Part, PartCost
from jaxscale.types import RunError

MAX_MICROBATCHES = 64
STATE_COPIES = 4  # parameters, gradients and Adam's two moments


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Args:
        part: the components that it holds.
        num_replicas: devices, each of which has its share of every micro-batch's rows.
        seconds: of a micro-batch's forward and backward, with what is sent.
        num_bytes: on each of its devices.
    """

    part: Part
    num_replicas: int
    seconds: float
    num_bytes: float


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """How a loss is spread over stages.

    Args:
        stages: in order.
        num_microbatches: M.
        seconds: of a step: M + S - 1 ticks of the slowest stage, and its sum of gradients.
    """

    stages: tuple[Stage, ...]
    num_microbatches: int
    seconds: float

    @property
    def num_devices(self) -> int:
        """Devices that are used."""
        return sum(stage.num_replicas for stage in self.stages)


@dataclasses.dataclass(frozen=True)
class Table:
    """What stages would cost.

    Args:
        seconds: [L + 1, L + 1, D + 1] of a stage of blocks i to j - 1 on r devices, at [i, j, r];
            infinite where it is impossible.
        num_bytes: the same, on each device.
    """

    seconds: np.ndarray
    num_bytes: np.ndarray

    def within(self, limit_bytes: float) -> np.ndarray:
        """The seconds, infinite where the memory does not suffice."""
        return np.where(self.num_bytes <= limit_bytes, self.seconds, np.inf)


def smallest_maximum(costs: np.ndarray, num_stages: int) -> tuple[float, list[tuple[int, int]]]:
    """The cut into consecutive stages whose largest cost is smallest.

    Args:
        costs: [L + 1, L + 1, D + 1] of blocks i to j - 1 on r devices.
        num_stages: S.
    Returns:
        (the largest cost, [(the block after a stage's last, its devices)]). Not all devices need be
        used. Infinite and empty if it is impossible.
    Cost: S D steps over [L, L, D].
    """
    num_ends, num_counts = costs.shape[1:]
    best = np.full((num_ends, num_counts), np.inf)
    best[0, 0] = 0.0
    steps = []
    for _ in range(num_stages):
        following = np.full_like(best, np.inf)
        begin = np.zeros(best.shape, int)
        count = np.zeros(best.shape, int)
        for r in range(1, num_counts):
            # [i, j, d]: the stages before end at block i with d devices, this one has i to j - 1.
            worst = np.maximum(best[:, None, : num_counts - r], costs[:, :, r, None])
            smallest, at = worst.min(0), worst.argmin(0)
            is_better = smallest < following[:, r:]
            following[:, r:] = np.where(is_better, smallest, following[:, r:])
            begin[:, r:] = np.where(is_better, at, begin[:, r:])
            count[:, r:] = np.where(is_better, r, count[:, r:])
        steps.append((begin, count))
        best = following
    num_used = int(best[-1].argmin())
    value = float(best[-1, num_used])
    if not math.isfinite(value):
        return value, []
    return value, _followed_back(steps, num_ends - 1, num_used)


def _followed_back(
    steps: list[tuple[np.ndarray, np.ndarray]],
    end: int,
    num_devices: int,
) -> list[tuple[int, int]]:
    found = []
    for begin, count in reversed(steps):
        replicas = int(count[end, num_devices])
        found.append((end, replicas))
        end, num_devices = int(begin[end, num_devices]), num_devices - replicas
    return found[::-1]


class StagePlanner:
    """Finds the stages of one traced loss on one cluster.

    Args:
        costs: of its parts.
        blocks: in order.
        num_rows: of the traced batch.
        cluster: whose devices are alike.
        limit_bytes: that a device may need.
    """

    def __init__(
        self,
        costs: ModelledCosts,
        blocks: Sequence[Part],
        *,
        num_rows: int,
        cluster: Cluster,
        limit_bytes: float,
    ):
        self.costs, self.blocks, self.num_rows = costs, blocks, num_rows
        self.cluster, self.limit_bytes = cluster, limit_bytes
        num = len(blocks)
        self._parts: dict[tuple[int, int], Part] = {}
        self._costs: dict[tuple[int, int], PartCost] = {}
        for i in range(num):
            part = blocks[i]
            for j in range(i + 1, num + 1):
                part = part if j == i + 1 else costs.merged([part, blocks[j - 1]])
                self._parts[i, j], self._costs[i, j] = part, costs.cost(part)

    def search(self) -> StagePlan:
        """The plan whose step is estimated to be shortest, over all stages and micro-batches.

        Raises:
            RunError: no plan fits; says how many bytes the nearest is above the limit.
        """
        found, nearest = [], math.inf
        for num_microbatches in self._num_microbatches():
            table = self._table(num_microbatches)
            seconds = table.within(self.limit_bytes)
            for num_stages in range(1, min(len(self.blocks), self.cluster.num_devices) + 1):
                slowest, cut = smallest_maximum(seconds, num_stages)
                if cut:
                    found.append(self._plan(slowest, cut, num_microbatches, table))
                elif not found:
                    least, _ = smallest_maximum(table.num_bytes, num_stages)
                    nearest = min(nearest, least)
        if not found:
            over = f"{nearest - self.limit_bytes:,.0f} bytes above {self.limit_bytes:,.0f}"
            raise RunError(f"no plan fits; the nearest is {over} on its fullest device")
        return min(found, key=lambda plan: plan.seconds)

    def _num_microbatches(self) -> list[int]:
        powers = [2**k for k in range(MAX_MICROBATCHES.bit_length())]
        fitting = [num for num in powers if self.num_rows % num == 0]
        # With a single row JAX may trace other equations than the plan's: what it would broadcast
        # has its shape already.
        return [num for num in fitting if num == 1 or self.num_rows // num > 1]

    def _table(self, num_microbatches: int) -> Table:
        num, devices = len(self.blocks), self.cluster.num_devices
        shape = (num + 1, num + 1, devices + 1)
        seconds, num_bytes = np.full(shape, np.inf), np.full(shape, np.inf)
        rows = self.num_rows // num_microbatches
        for (i, j), cost in self._costs.items():
            for replicas in range(1, devices + 1):
                if rows % replicas == 0:
                    share = 1 / (num_microbatches * replicas)
                    seconds[i, j, replicas] = self._seconds(cost, share, num_microbatches)
                    num_bytes[i, j, replicas] = _bytes(cost, share, num_microbatches)
        return Table(seconds, num_bytes)

    def _seconds(self, cost: PartCost, share: float, num_microbatches: int) -> float:
        """Of a micro-batch through a stage, forward and backward."""
        again = cost.forward_s if num_microbatches > 1 else 0.0
        computing = share * (cost.forward_s + cost.backward_s + again)
        device = self.cluster.device
        sent = 2 * share * (cost.input_bytes + cost.output_bytes)
        return computing + sent / (device.link_bandwidth * device.link_share)

    def _plan(
        self,
        slowest: float,
        cut: list[tuple[int, int]],
        num_microbatches: int,
        table: Table,
    ) -> StagePlan:
        stages, begin, longest_sum = [], 0, 0.0
        device = self.cluster.device
        for end, replicas in cut:
            place = begin, end, replicas
            stages.append(
                Stage(
                    self._parts[begin, end],
                    replicas,
                    float(table.seconds[place]),
                    float(table.num_bytes[place]),
                )
            )
            if replicas > 1:
                moved = 2 * (replicas - 1) / replicas * self._costs[begin, end].params_bytes
                seconds = LATENCY_S + moved / (device.link_bandwidth * device.link_share)
                longest_sum = max(longest_sum, seconds)
            begin = end
        num_ticks = num_microbatches + len(cut) - 1
        return StagePlan(tuple(stages), num_microbatches, num_ticks * slowest + longest_sum)


def _bytes(cost: PartCost, share: float, num_microbatches: int) -> float:
    """On each device of a stage; GPipe keeps every micro-batch's inputs until its backward."""
    stashed = num_microbatches * share * cost.input_bytes
    return STATE_COPIES * cost.params_bytes + stashed + share * cost.kept_bytes
