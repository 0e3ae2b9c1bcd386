"""Parameters merged from what the ranks of another system hold, by the rules of `patterns`."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxscale.checkpoint.boxes import Copies, Merged, Placement
from jaxscale.checkpoint.patterns import Cut, Kind, Rule, Target
from jaxscale.checkpoint.source import LazyArray
from jaxscale.checkpoint.views import Divided, Permuted, Rows
from jaxscale.types import InputError

Ranks = Mapping[str, int]
COMBINE: dict[Kind, Copies] = {"unique": "equal", "replicated": "equal", "average": "mean"}
MAX_NAMED = 4
INTEGERS = "iub"  # and truth values


@dataclasses.dataclass(frozen=True)
class Shard:
    """A tensor as one rank holds it.

    Args:
        name: in the source's words.
        ranks: number of the rank on each axis.
        array: its part.
        state: what it is of the parameter, such as "exp_avg"; becomes the first word of its path.
    """

    name: str
    ranks: Ranks
    array: LazyArray
    state: str = ""

    @property
    def origin(self) -> str:
        """The tensor and its rank, for messages."""
        words = [self.state, self.name] if self.state else [self.name]
        return f"{'/'.join(words)} of {describe_ranks(self.ranks)}"


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one name's shards are joined to so far."""

    ranks: Ranks
    array: LazyArray
    origin: str


@dataclasses.dataclass(frozen=True)
class _Claim:
    """A shard that is part of the parameter which one target of its rule names."""

    rule: Rule
    place: int
    shard: Shard


def merge(shards: Iterable[Shard], rules: Sequence[Rule]) -> dict[str, Merged]:
    """The parameters by path, from what the ranks hold; nothing is read yet.

    Raises:
        InputError: a tensor matches no rule or several, a rule is not used, ranks are missing, or
            an element of a parameter would be written never or twice. Names tensor, rule and ranks.
    """
    grouped: dict[str, dict[tuple, list]] = {}
    used: set[int] = set()
    # Counted over all tensors: one of which a rank has lost its part must not look whole.
    sizes: dict[str, int] = {}
    for shard in shards:
        for axis, number in shard.ranks.items():
            sizes[axis] = max(sizes.get(axis, 0), number + 1)
        number, found = _only_match(shard, rules)
        used.add(number)
        rule = rules[number]
        for place, target in enumerate(rule.becomes):
            path, index = _place(shard, rule, target, found)
            parts = grouped.setdefault(path, {}).setdefault(index, [])
            parts.append(_Claim(rule, place, shard))
    for number, rule in enumerate(rules):
        if number not in used:
            raise InputError("rules", rule.match, "a rule that matches some tensor")
        _check_offsets(rule, sizes)
    merged = {}
    for path, by_index in grouped.items():
        elements = {index: _join(path, parts, sizes) for index, parts in by_index.items()}
        merged[path] = elements[()] if () in elements else _stacked(path, elements)
        if () in elements and len(elements) > 1:
            raise InputError(path, "tensors with and without a number", "one kind of rule")
    return merged


def describe_ranks(ranks: Ranks) -> str:
    """Such as "rank tensor=0, pipeline=1"."""
    listed = ", ".join(f"{axis}={number}" for axis, number in sorted(ranks.items()))
    return f"rank {listed}" if listed else "the only rank"


def _only_match(shard: Shard, rules: Sequence[Rule]) -> tuple[int, re.Match]:
    """The one rule for a tensor, by number, and how it matches the name."""
    found = []
    for number, rule in enumerate(rules):
        match = re.fullmatch(rule.match, shard.name)
        if match is not None:
            found.append((number, match))
    if len(found) != 1:
        given = " and ".join(repr(rules[number].match) for number, _ in found) or "no rule"
        raise InputError(shard.origin, given, "exactly one rule that matches it")
    return found[0]


def _place(
    shard: Shard,
    rule: Rule,
    target: Target,
    found: re.Match,
) -> tuple[str, tuple[int, ...]]:
    """The path of the tensor's parameter and its index in the parameter's first dims."""
    groups: dict[str, Any] = {
        name: _number(shard, rule, name, text)
        for name, text in found.groupdict().items()
        if text is not None  # of a part that the name has not
    }
    try:
        path = target.to.format(shard.name, **groups)
    except (KeyError, IndexError, ValueError) as error:
        expected = f"names of groups of {rule.match!r} that match some of the name"
        raise InputError(shard.origin, target.to, expected) from error
    for name in rule.stack:
        if name not in groups:
            raise InputError(shard.origin, None, f"a number for group {name} of {rule.match!r}")
    index = tuple(groups[name] for name in rule.stack)
    return f"{shard.state}/{path}" if shard.state else path, index


def _number(shard: Shard, rule: Rule, group: str, text: str) -> str | int:
    """What a group matched, as a number where it is used as one."""
    if group not in rule.offsets and group not in rule.stack:
        return text
    if not text.isdecimal():
        raise InputError(shard.origin, text, f"a number for group {group} of {rule.match!r}")
    offset = rule.offsets.get(group)
    if offset is None:
        return int(text)
    rank = shard.ranks.get(offset.axis, -1)
    if not 0 <= rank < len(offset.firsts):
        expected = f"a rank on {offset.axis!r} below {len(offset.firsts)}, see {rule.match!r}"
        raise InputError(shard.origin, rank, expected)
    return int(text) + offset.firsts[rank]


def _check_offsets(rule: Rule, sizes: Mapping[str, int]) -> None:
    """Raises InputError if ranks that a rule counts are lost: the rest would look whole."""
    for group, offset in rule.offsets.items():
        if sizes[offset.axis] != len(offset.firsts):
            given = f"{sizes[offset.axis]} ranks of {offset.axis}"
            expected = f"{len(offset.firsts)}, as group {group} of rule {rule.match!r} counts"
            raise InputError("checkpoint", given, expected)


def _join(
    path: str,
    claims: list[_Claim],
    sizes: Mapping[str, int],
) -> Merged:
    """One parameter, or one element of a stack, from all shards of it."""
    by_name: dict[tuple[str, int], list[_Claim]] = collections.defaultdict(list)
    for claim in claims:
        by_name[claim.shard.name, claim.place].append(claim)
    copies: list[_Part] = []
    for named in by_name.values():
        copies += _joined_by_cuts(named, sizes)
    rules = list(dict.fromkeys(claim.rule.match for claim in claims))
    kinds = {claim.rule.kind for claim in claims}
    if len(kinds) > 1:
        raise InputError(path, f"rules {rules}", f"one kind of copies, not {sorted(kinds)}")
    (kind,) = kinds
    if kind == "unique" and len(copies) > 1:
        given = " and ".join(copy.origin for copy in copies[:MAX_NAMED])
        raise InputError(path, given, f"one tensor, as rule {rules[0]!r} is of unique ones")
    dtype = copies[0].array.dtype
    if kind == "average" and dtype.kind in INTEGERS:
        expected = f"numbers with a mean, as rule {rules[0]!r} averages them"
        raise InputError(path, str(dtype), expected)
    for copy in copies[1:]:
        if copy.array.shape != copies[0].array.shape:
            given = f"{copy.array.shape} in {copy.origin}"
            raise InputError(path, given, f"{copies[0].array.shape}, as in {copies[0].origin}")
    return Merged(
        path,
        copies[0].array.shape,
        dtype,
        tuple((_whole(copy),) for copy in copies),
        COMBINE[kind],
    )


def _joined_by_cuts(claims: list[_Claim], sizes: Mapping[str, int]) -> list[_Part]:
    """The copies of one tensor's share of a parameter."""
    rule, place = claims[0].rule, claims[0].place
    parts = []
    for claim in claims:
        shard = claim.shard
        parts.append(_Part(dict(shard.ranks), shard.array, shard.origin))
    for cut in rule.cuts:
        parts = [_joined(cut, rule, group) for group in _groups(cut, rule, parts, sizes)]
    return [dataclasses.replace(part, array=_seen(rule, place, part)) for part in parts]


def _seen(rule: Rule, place: int, part: _Part) -> LazyArray:
    """Of a joined tensor the rows of one target, with the dims of its parameter."""
    array, target = part.array, rule.becomes[place]
    if rule.targets:
        rows = [each.rows or 0 for each in rule.targets]
        if not array.shape or sum(rows) != array.shape[0]:
            expected = f"{' + '.join(map(str, rows))} rows, the targets of rule {rule.match!r}"
            raise InputError(part.origin, tuple(array.shape), expected)
        array = Rows(array, sum(rows[:place]), rows[place])
    if target.axes:
        if sorted(target.axes) != list(range(len(array.shape))):
            given = f"axes {target.axes} in rule {rule.match!r}"
            raise InputError(part.origin, given, f"each of the {len(array.shape)} dims once")
        array = Permuted(array, target.axes)
    return Divided(array, target.shape) if target.shape else array


def _groups(
    cut: Cut,
    rule: Rule,
    parts: list[_Part],
    sizes: Mapping[str, int],
) -> Iterator[list[_Part]]:
    """Parts that differ in their rank on the cut's axis alone, in its order, all of them."""
    groups: dict[tuple, dict[int, _Part]] = collections.defaultdict(dict)
    for part in parts:
        if cut.axis not in part.ranks:
            expected = f"a rank on {cut.axis!r}, over which rule {rule.match!r} cuts"
            raise InputError(part.origin, dict(part.ranks), expected)
        others = tuple(sorted(item for item in part.ranks.items() if item[0] != cut.axis))
        group = groups[others]
        number = part.ranks[cut.axis]
        if number in group:
            raise InputError(part.origin, group[number].origin, "one tensor for each rank")
        group[number] = part
    num_ranks = sizes[cut.axis]
    for group in groups.values():
        missing = sorted(set(range(num_ranks)) - set(group))
        if missing:
            first = next(iter(group.values()))
            expected = f"all of {num_ranks} ranks of rule {rule.match!r}; missing are {missing}"
            raise InputError(first.origin, f"{cut.axis} ranks {sorted(group)}", expected)
        yield [group[number] for number in range(num_ranks)]


def _joined(cut: Cut, rule: Rule, parts: list[_Part]) -> _Part:
    """The tensor of which the ranks of one axis hold `parts`, in their order."""
    first = parts[0]
    shape, dim = first.array.shape, cut.dim
    for part in parts:
        same = [*part.array.shape]
        same[dim : dim + 1] = shape[dim : dim + 1]
        if not 0 <= dim < len(shape) or tuple(same) != shape:
            expected = f"shape {shape} but in dim {dim}, as {first.origin} has ({rule.match!r})"
            raise InputError(part.origin, part.array.shape, expected)
    rows = [part.array.shape[dim] for part in parts]
    widths = _widths(cut, rule, parts, rows)
    whole = sum(rows)
    size = whole if cut.size is None else cut.size
    if size > whole:
        raise InputError(first.origin, size, f"Cut.size of at most the {whole} rows that there are")
    placements = []
    for rank, part in enumerate(parts):
        read = 0
        block_start = 0
        for width in widths:
            start = rank if cut.is_strided else block_start + sum(width[:rank])
            step = len(parts) if cut.is_strided else 1
            count = min(width[rank], max(0, -(-(size - start) // step)))
            if count:
                placements.append(_along(part, dim, read, start, count, step))
            read += width[rank]
            block_start += sum(width)
    joined = (*shape[:dim], size, *shape[dim + 1 :])
    others = {axis: number for axis, number in first.ranks.items() if axis != cut.axis}
    origin = f"{first.origin} and its {cut.axis} ranks"
    merged = Merged(origin, joined, first.array.dtype, (tuple(placements),))
    return _Part(others, merged, origin)


def _widths(
    cut: Cut,
    rule: Rule,
    parts: list[_Part],
    rows: list[int],
) -> tuple[tuple[int, ...], ...]:
    """Rows of each block on each rank, [block][rank]."""
    num_ranks = len(parts)
    if not cut.blocks:
        return (tuple(rows),)
    widths = cut.widths
    for block in cut.blocks:
        if not cut.widths and block % num_ranks:
            expected = f"widths in rule {rule.match!r}, as {block} rows are not even over the ranks"
            raise InputError(parts[0].origin, f"{num_ranks} ranks of {cut.axis}", expected)
    if not widths:
        widths = tuple((block // num_ranks,) * num_ranks for block in cut.blocks)
    for block, width in zip(cut.blocks, widths):
        if len(width) != num_ranks or sum(width) != block:
            expected = f"{num_ranks} widths that sum to {block} in rule {rule.match!r}"
            raise InputError(parts[0].origin, width, expected)
    for rank, part in enumerate(parts):
        own = [width[rank] for width in widths]
        if sum(own) != rows[rank]:
            expected = f"{' + '.join(map(str, own))} rows in dim {cut.dim}, see {rule.match!r}"
            raise InputError(part.origin, rows[rank], expected)
    return widths


def _along(
    part: _Part,
    dim: int,
    read: int,
    start: int,
    count: int,
    step: int,
) -> Placement:
    """Rows [read, read + count) of a part along one dim, and all of its other dims."""
    shape = part.array.shape
    zeros = (0,) * len(shape)
    ones = (1,) * len(shape)
    return Placement(
        part=part.array,
        reads=_with(zeros, dim, read),
        starts=_with(zeros, dim, start),
        sizes=_with(shape, dim, count),
        steps=_with(ones, dim, step),
        origin=part.origin,
    )


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _whole(part: _Part) -> Placement:
    shape = part.array.shape
    zeros, ones = (0,) * len(shape), (1,) * len(shape)
    return Placement(part.array, zeros, zeros, shape, ones, part.origin)


def _stacked(path: str, elements: dict[tuple[int, ...], Merged]) -> Merged:
    """The parameter whose first dims number its elements."""
    first = next(iter(elements.values()))
    num_dims = {len(index) for index in elements}
    if len(num_dims) > 1:
        raise InputError(path, "rules with stacks of several dims", "one number of dims")
    leading = tuple(1 + max(sizes) for sizes in zip(*elements))
    shape = (*leading, *first.shape)
    placements = []
    for index, element in elements.items():
        own = element.shape
        placement = Placement(
            part=element,
            reads=(0,) * len(own),
            starts=(*index, *(0 for _ in own)),
            sizes=(*(1 for _ in index), *own),
            steps=(1,) * (len(index) + len(own)),
            origin=f"element {list(index)}",
        )
        if own != first.shape:
            raise InputError(path, f"{own} in {placement.origin}", f"{first.shape}")
        placements.append(placement)
    return Merged(path, shape, first.dtype, (tuple(placements),))
