"""Stages: the dynamic programme over blocks, devices, replicas and micro-batches.

Source: Tanaka et al. 2021, RaNNC (arXiv 2103.16063), its third phase. Here the slowest stage's
forward and backward and the longest sum of gradients are minimised together, exactly; any number
of replicas is allowed that divides a micro-batch; and the inputs of all micro-batches in flight
count as memory.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxscale.planner.cluster import LATENCY_S, Cluster
from jaxscale.planner.costs import BACKWARD_PASSES, ModelledCosts, Part, PartCost
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
        sums: the same, seconds in which its replicas add up their gradients, once a step.
        num_bytes: the same, on each device.
        num_microbatches: M.
    """

    seconds: np.ndarray
    sums: np.ndarray
    num_bytes: np.ndarray
    num_microbatches: int

    def within(self, limit_bytes: float) -> np.ndarray:
        """The seconds, infinite where the memory does not suffice."""
        return np.where(self.num_bytes <= limit_bytes, self.seconds, np.inf)

    def ticks_s(self, cut: "Cut") -> float:
        """Seconds of a step's M + S - 1 ticks."""
        return (self.num_microbatches + len(cut.stages) - 1) * cut.largest

    def longest_sum(self, cut: "Cut") -> float:
        """Seconds of the longest sum of gradients; the stages' run at the same time."""
        return max(float(self.sums[place]) for place in cut.places())


@dataclasses.dataclass(frozen=True)
class Cut:
    """Consecutive stages.

    Args:
        largest: the largest of their costs; infinite if no cut is possible.
        stages: of each the block after its last, and its devices.
    """

    largest: float
    stages: list[tuple[int, int]]

    def places(self) -> list[tuple[int, int, int]]:
        """Of each stage its first block, the block after its last, and its devices."""
        ends = [end for end, _ in self.stages]
        pairs = zip([0, *ends], self.stages)
        return [(begin, end, replicas) for begin, (end, replicas) in pairs]


def fastest_cut(
    table: Table,
    limit_bytes: float,
    max_stages: int,
    bound_s: float,
) -> Cut | None:
    """The cut whose step is shortest, if it is shorter than `bound_s`: its ticks and longest sum.

    The cut with the shortest ticks may have a long sum. Another one can beat it only with shorter
    sums, so stages with sums as long are forbidden then, until the ticks alone take too long.
    """
    allowed, found = table.within(limit_bytes), None
    while True:
        cuts = [cut for cut in smallest_maxima(allowed, max_stages) if cut.stages]
        for cut in cuts:
            seconds = table.ticks_s(cut) + table.longest_sum(cut)
            if seconds < bound_s:
                bound_s, found = seconds, cut
        left = [table.longest_sum(cut) for cut in cuts if table.ticks_s(cut) < bound_s]
        if not left:
            return found
        allowed = np.where(table.sums < max(left), allowed, np.inf)


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
        best, nearest = None, math.inf
        max_stages = min(len(self.blocks), self.cluster.num_devices)
        for num_microbatches in self._num_microbatches():
            table = self.table(num_microbatches)
            bound_s = best.seconds if best else math.inf
            cut = fastest_cut(table, self.limit_bytes, max_stages, bound_s)
            if cut is not None:
                best = self._plan(cut, table)
            elif best is None:
                by_memory = smallest_maxima(table.num_bytes, max_stages)
                nearest = min(nearest, *(cut.largest for cut in by_memory))
        if best is not None:
            return best
        if nearest <= self.limit_bytes:
            raise RunError("no plan fits: a block ran out of memory when it was measured")
        over = f"{nearest - self.limit_bytes:,.0f} bytes above {self.limit_bytes:,.0f}"
        raise RunError(f"no plan fits; the nearest is {over} on its fullest device")

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
        seconds, sums, num_bytes = (np.full(shape, np.inf) for _ in range(3))
        rows = self.num_rows // num_microbatches
        for (i, j), cost in self._costs.items():
            for replicas in range(1, devices + 1):
                if rows % replicas == 0:
                    share = 1 / (num_microbatches * replicas)
                    seconds[i, j, replicas] = self._seconds(cost, share, num_microbatches)
                    sums[i, j, replicas] = self._sum_s(cost, replicas)
                    num_bytes[i, j, replicas] = _bytes(cost, share, num_microbatches)
        return Table(seconds, sums, num_bytes, num_microbatches)

    def _seconds(self, cost: PartCost, share: float, num_microbatches: int) -> float:
        """Of a micro-batch through a stage, forward and backward."""
        num_forwards = 2 if num_microbatches > 1 else 1  # the backward runs the stage again
        computing = share * (num_forwards * cost.forward_s + cost.backward_s)
        computing += (num_forwards + BACKWARD_PASSES) * cost.fixed_s
        sent = 2 * share * (cost.input_bytes + cost.output_bytes)
        return computing + sent / self._bandwidth

    @property
    def _bandwidth(self) -> float:
        """Bytes/s between devices; with several hosts any two may have the network between them."""
        device, is_one_host = self.cluster.device, self.cluster.num_hosts == 1
        peak = device.link_bandwidth if is_one_host else device.network_bandwidth
        return peak * device.link_share

    def _sum_s(self, cost: PartCost, replicas: int) -> float:
        """Of an all-reduce of a stage's gradients."""
        if replicas == 1:
            return 0.0
        moved = 2 * (replicas - 1) / replicas * cost.params_bytes
        return LATENCY_S + moved / self._bandwidth

    def _plan(self, cut: Cut, table: Table) -> StagePlan:
        stages = []
        for place in cut.places():
            begin, end, replicas = place
            seconds, num_bytes = float(table.seconds[place]), float(table.num_bytes[place])
            stages.append(Stage(self._parts[begin, end], replicas, seconds, num_bytes))
        seconds = table.ticks_s(cut) + table.longest_sum(cut)
        return StagePlan(tuple(stages), table.num_microbatches, seconds)


def _bytes(cost: PartCost, share: float, num_microbatches: int) -> float:
    """On each device of a stage; GPipe keeps what each micro-batch's stages are sent and send."""
    stashed = num_microbatches * share * (cost.input_bytes + cost.output_bytes)
    return STATE_COPIES * cost.params_bytes + stashed + share * cost.kept_bytes
