"""Blocks: components joined by multilevel coarsening, as many as the search of stages can afford.

Source: Tanaka et al. 2021, RaNNC (arXiv 2103.16063), its second phase, after the multilevel scheme
of Karypis and Kumar 1998 (doi 10.1137/S1064827595287997).
"""

import math

from jaxscale.planner.costs import ModelledCosts, Part

MAX_BLOCKS = 32
MAX_DEVIATIONS = 2  # above the mean time of all parts that a joined part may take


def make_blocks(
    costs: ModelledCosts,
    bandwidth: float,
    num_blocks: int = MAX_BLOCKS,
) -> list[Part]:
    """Joins components to at most `num_blocks` blocks.

    Every component is in one block; no path leaves a block and comes back, so that blocks can run
    one after the other; and they come in such an order.

    Args:
        costs: of the components.
        bandwidth: bytes/s by which a value passes from a block to another.
        num_blocks: at most; it is fewer only if there are fewer components.
    """
    coarsening = _Coarsening(costs, bandwidth)
    num_before = math.inf
    while num_blocks < len(coarsening.order) < num_before:
        num_before = len(coarsening.order)
        coarsening.match(num_blocks)
    coarsening.merge_smallest(num_blocks)
    return [coarsening.parts[each] for each in coarsening.order]


class _Coarsening:
    """Parts in an order in which they can run, that are joined two by two."""

    def __init__(self, costs: ModelledCosts, bandwidth: float):
        self.costs, self.bandwidth = costs, bandwidth
        atoms = costs.atoms
        self.order = list(range(len(atoms)))
        self.next_number = len(atoms)
        self.parts: dict[int, Part] = dict(enumerate(atoms))
        self.seconds: dict[int, float] = {}
        self.place: dict[int, int] = {}
        # The part at a place; parts that were joined leave places free.
        self.at: dict[int, int] = {}
        self.after: dict[int, set[int]] = {}
        self.before: dict[int, set[int]] = {}
        for number, part in enumerate(atoms):
            self.seconds[number] = costs.seconds(part)
            self.place[number] = self.at[number] = number
            self.before[number] = set()
        for number, others in enumerate(costs.components.successors):
            self.after[number] = set(others)
            for other in others:
                self.before[other].add(number)

    def match(self, num_blocks: int) -> None:
        """One level: each part, the cheapest first, joins the follower that gains most by it."""
        limit = self._limit()
        fresh: set[int] = set()  # parts of this level that are joined already
        for number in sorted(self.order, key=self.seconds.__getitem__):
            if len(self.place) <= num_blocks:
                break
            if number in self.parts:
                new = self._join_best(number, fresh, limit)
                fresh.add(new)
        self.order = sorted(self.place, key=self.place.__getitem__)

    def _join_best(
        self,
        number: int,
        fresh: set[int],
        limit: float,
    ) -> int:
        """Joins a part with the follower that gains most, if there is one; returns what it is."""
        gains = []
        for other in self.after[number] - fresh:
            joined = self._joined(number, other)
            gain = self._gain(number, other, joined, limit)
            if gain >= 0:
                # Of equal gains the one that stands first.
                gains.append((gain, -self.place[other], other, joined))
        gains.sort(key=lambda each: each[:2], reverse=True)
        for _, _, other, joined in gains:
            between = self._between(number, other)
            if between is not None:
                return self._join(number, other, joined, between)
        return number

    def _joined(self, number: int, other: int) -> Part:
        pair = [self.parts[number], self.parts[other]]
        return self.costs.merged(pair)

    def merge_smallest(self, num_blocks: int) -> None:
        """Joins the cheapest part with its cheaper neighbour in the order until few are left."""
        while len(self.order) > num_blocks:
            seconds = [self.seconds[number] for number in self.order]
            cheapest = seconds.index(min(seconds))
            sides = range(max(cheapest - 1, 0), min(cheapest + 2, len(seconds)))
            others = [side for side in sides if side != cheapest]
            side = min(others, key=seconds.__getitem__)
            first = min(cheapest, side)
            number, other = self.order[first : first + 2]
            joined = self._joined(number, other)
            new = self._join(number, other, joined, [])
            self.order[first : first + 2] = [new]

    def _limit(self) -> float:
        seconds = [self.seconds[number] for number in self.order]
        mean = sum(seconds) / len(seconds)
        variance = sum((each - mean) ** 2 for each in seconds) / len(seconds)
        return mean + MAX_DEVIATIONS * math.sqrt(variance)

    def _gain(
        self,
        number: int,
        other: int,
        joined: Part,
        limit: float,
    ) -> float:
        """Seconds that joining saves, among them those of sending; negative if it is too large."""
        one, another = self.seconds[number], self.seconds[other]
        seconds = self.costs.seconds(joined)
        if seconds > max(limit, one, another):
            return -1.0
        passed = self.parts[number].outputs & self.parts[other].inputs
        sent = self.costs.bytes_of(passed)
        apart = one + another
        return apart + sent / self.bandwidth - seconds

    def _between(self, number: int, other: int) -> list[int] | None:
        """Parts that run after `number` and stand before `other` in the order.

        None if a path over them leads to `other`, so that the two cannot be joined.
        """
        last = self.place[other]
        found: set[int] = set()
        waiting = [each for each in self.after[number] if each != other]
        while waiting:
            each = waiting.pop()
            if each == other:
                return None
            if each in found or self.place[each] > last:
                continue
            found.add(each)
            waiting += self.after[each]
        return sorted(found, key=self.place.__getitem__)

    def _join(
        self,
        number: int,
        other: int,
        joined: Part,
        between: list[int],
    ) -> int:
        """Replaces two parts by one, which stands before what must run after the first of them."""
        new, self.next_number = self.next_number, self.next_number + 1
        first, last = self.place[number], self.place[other]
        places = [place for place in range(first, last + 1) if place in self.at]
        moved = {number, other, *between}
        stay = [self.at[place] for place in places if self.at[place] not in moved]
        for place in places:
            del self.at[place]
        # One place becomes free.
        for each, place in zip([*stay, new, *between], places):
            self.place[each], self.at[place] = place, each
        for by_number in (self.place, self.parts, self.seconds):
            del by_number[number]
            del by_number[other]
        self.parts[new] = joined
        self.seconds[new] = self.costs.seconds(joined)
        self._reconnect(number, other, new)
        return new

    def _reconnect(self, number: int, other: int, new: int) -> None:
        pair = {number, other}
        self.after[new] = (self.after.pop(number) | self.after.pop(other)) - pair
        self.before[new] = (self.before.pop(number) | self.before.pop(other)) - pair
        for each in self.after[new]:
            self.before[each] = self.before[each] - pair | {new}
        for each in self.before[new]:
            self.after[each] = self.after[each] - pair | {new}
