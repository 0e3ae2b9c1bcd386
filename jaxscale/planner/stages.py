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


@dataclasses.dataclass(frozen=True)
class Cut:
    """Consecutive stages.

    Args:
        largest: the largest of their costs; infinite if no cut is possible.
        stages: of each the block after its last, and its devices.
    """

    largest: float
    stages: list[tuple[int, int]]


def smallest_maxima(costs: np.ndarray, max_stages: int) -> list[Cut]:
    """For every number of stages the cut whose largest cost is smallest.

    Args:
        costs: [L + 1, L + 1, D + 1] of blocks i to j - 1 on r devices.
        max_stages: S.
    Returns:
        The cuts into 1 to S stages, in which not all devices need be used.
    Cost: S D steps over [L, L, D].
    """
    num_ends, num_counts = costs.shape[1:]
    best = np.full((num_ends, num_counts), np.inf)
    best[0, 0] = 0.0
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    found = []
    for _ in range(max_stages):
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
        is_possible = math.isfinite(value)
        stages = _followed_back(steps, num_ends - 1, num_used) if is_possible else []
        found.append(Cut(value, stages))
    return found


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
            RunError: no plan fits; says how many bytes the nearest is above the limit, or that a
                block could not be measured.
        """
        found, nearest = [], math.inf
        for num_microbatches in self._num_microbatches():
            table = self.table(num_microbatches)
            seconds = table.within(self.limit_bytes)
            max_stages = min(len(self.blocks), self.cluster.num_devices)
            for cut in smallest_maxima(seconds, max_stages):
                if cut.stages:
                    found.append(self._plan(cut, num_microbatches, table))
            if not found:
                by_memory = smallest_maxima(table.num_bytes, max_stages)
                nearest = min(nearest, *(cut.largest for cut in by_memory))
        if not found and nearest <= self.limit_bytes:
            raise RunError("no plan fits: a block ran out of memory when it was measured")
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

    def table(self, num_microbatches: int) -> Table:
        """The costs of all stages with so many micro-batches."""
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
        sent = 2 * share * (cost.input_bytes + cost.output_bytes)
        return computing + sent / self._bandwidth

    @property
    def _bandwidth(self) -> float:
        """Bytes/s between devices; with several hosts any two may have the network between them."""
        device, is_one_host = self.cluster.device, self.cluster.num_hosts == 1
        peak = device.link_bandwidth if is_one_host else device.network_bandwidth
        return peak * device.link_share

    def _plan(
        self,
        cut: Cut,
        num_microbatches: int,
        table: Table,
    ) -> StagePlan:
        stages, begin, longest_sum = [], 0, 0.0
        for end, replicas in cut.stages:
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
                longest_sum = max(longest_sum, LATENCY_S + moved / self._bandwidth)
            begin = end
        num_ticks = num_microbatches + len(stages) - 1
        seconds = num_ticks * cut.largest + longest_sum
        return StagePlan(tuple(stages), num_microbatches, seconds)


def _bytes(cost: PartCost, share: float, num_microbatches: int) -> float:
    """On each device of a stage; GPipe keeps every micro-batch's inputs until its backward."""
    stashed = num_microbatches * share * cost.input_bytes
    return STATE_COPIES * cost.params_bytes + stashed + share * cost.kept_bytes
