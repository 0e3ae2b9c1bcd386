"""The collectives of a compiled module, read off its text: what each delivers, and how often."""

import collections
import dataclasses
import math
import re

KINDS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
)
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_COLLECTIVE = re.compile(rf"= (?P<type>.+?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]\w*)\[(?P<shape>[\d,]*)\]")
_COMPUTATION = re.compile(
    r"^(?:ENTRY )?%?(?P<name>[\w.-]+) [^\n]*\{\n(?P<body>.*?)^\}", re.MULTILINE | re.DOTALL
)
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|\w+_computations?)=\{?(?P<names>%[\w.-]+(?:, %[\w.-]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled module.

    Args:
        kind: one of KINDS.
        num_bytes: what it delivers on one device, each time.
        times: how often it runs: the product of the trip counts of the loops around it. Of a
            conditional's branches the one counts as taken that delivers most bytes: the slots of a
            pipeline are branches that do the same.
        is_exact: False where a loop around it does not say how often it runs, and was counted once.
    """

    kind: str
    num_bytes: int
    times: int
    is_exact: bool


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled module.

    Args:
        hlo: text of the compiled module.
    """
    # A computation is printed before those that call it, and the entry last.
    computations = {match["name"]: match["body"] for match in _COMPUTATION.finditer(hlo)}
    delivered = _delivered_by_computations(computations)
    entry = list(computations)[-1:]
    times = collections.Counter(entry)
    is_exact = collections.defaultdict(lambda: True)
    found = []
    for name, body in reversed(computations.items()):
        for line in body.splitlines():
            says_how_often = " while(" not in line or _TRIPS.search(line) is not None
            for called in _taken(line, delivered):
                times[called] += times[name] * _num_trips(line)
                is_exact[called] &= is_exact[name] and says_how_often
            match = _COLLECTIVE.search(line)
            if match and times[name]:
                num_bytes = _delivered_bytes(match)
                found.append(Collective(match["kind"], num_bytes, times[name], is_exact[name]))
    return found[::-1]


def _delivered_by_computations(computations: dict[str, str]) -> collections.Counter[str]:
    """Bytes that each computation delivers when it runs once, with those that it calls."""
    delivered: collections.Counter[str] = collections.Counter()
    for name, body in computations.items():
        for line in body.splitlines():
            for called in _taken(line, delivered):
                delivered[name] += _num_trips(line) * delivered[called]
            if match := _COLLECTIVE.search(line):
                delivered[name] += _delivered_bytes(match)
    return delivered


def _num_trips(line: str) -> int:
    """How often a loop runs, if it says so; else 1."""
    match = _TRIPS.search(line)
    return int(match[1]) if match else 1


def _taken(line: str, delivered: collections.Counter[str]) -> list[str]:
    """The computations that an instruction runs; of a conditional's the one that delivers most."""
    names = []
    for called in _CALLED.finditer(line):
        names += called["names"].replace("%", "").split(", ")
    if " conditional(" in line:
        return [max(names, key=delivered.__getitem__)]
    return names


def collective_bytes(hlo: str) -> dict[str, list[int]]:
    """Bytes that each collective of a compiled module delivers on one device, by kind.

    A loop's body counts once.

    Args:
        hlo: text of the compiled module.
    """
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for match in _COLLECTIVE.finditer(hlo):
        found[match["kind"]].append(_delivered_bytes(match))
    return found


def _delivered_bytes(collective: re.Match) -> int:
    """Of the results alone: the type of an asynchronous start also has the operands."""
    result = collective["type"]
    if result.startswith("(("):
        # ((operands), results)
        results = result.split("), ", 1)[-1]
        return sum(map(_num_bytes, _ARRAY.finditer(results)))
    arrays = list(_ARRAY.finditer(result))
    has_operand = collective["start"] and collective["kind"] in ("all-gather", "collective-permute")
    if has_operand and len(arrays) > 1:
        arrays = arrays[1:2]  # (operand, result, perhaps a context of integers)
    return sum(map(_num_bytes, arrays))


def _num_bytes(array: re.Match) -> int:
    sizes = [int(size) for size in array["shape"].split(",") if size]
    return BYTES[array["type"]] * math.prod(sizes)
