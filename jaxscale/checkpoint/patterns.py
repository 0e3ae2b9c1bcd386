"""The pattern language: which parameter each rank's tensors are parts of, and where they lie in it.

Source: Lian et al. 2024, "Universal Checkpointing" (arXiv 2406.18820), section 3.2, for the
patterns: unique, replicated, fragment, average, and fragments of fused blocks. Here each of them
only says which boxes a tensor holds, see `boxes`.

A system's rules are one TOML file, such as

    [[rule]]
    match = 'layers\\.(?P<layer>\\d+)\\.qkv\\.weight'
    to = 'layers/qkv'
    stack = ['layer']
    cuts = [{axis = 'tensor', dim = 0, blocks = [64, 32, 32]}]
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal

from jaxscale import tree
from jaxscale.types import InputError, check_types

Kind = Literal["unique", "replicated", "average"]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor is cut along one dim over the ranks of an axis; the "fragment" of the paper.

    Args:
        axis: name of the axis, as the source names its ranks.
        dim: of the tensor.
        blocks: sizes of blocks that are fused along `dim` and cut one by one, such as q, k and v,
            or gate and up; empty for a tensor that is cut as one.
        widths: how many rows of each block each rank has, [block][rank], where blocks are not cut
            evenly; without blocks a rank's own shape says it.
        size: of the whole along `dim`; rows behind it are padding. None for no padding.
        is_strided: rank r holds the rows r, r + n, r + 2 n, ... of n ranks.
    """

    axis: str
    dim: int
    blocks: tuple[int, ...] = ()
    widths: tuple[tuple[int, ...], ...] = ()
    size: int | None = None
    is_strided: bool = False

    def __post_init__(self):
        check_types(self)
        if self.is_strided and self.blocks:
            raise InputError("Cut.blocks", self.blocks, "no blocks with is_strided")
        if self.widths and len(self.widths) != len(self.blocks):
            raise InputError("Cut.widths", self.widths, f"a row for each of {self.blocks}")


@dataclasses.dataclass(frozen=True)
class Offset:
    """A number in a tensor's name counts from a first one that depends on its rank.

    Args:
        axis: such as "pipeline" for the layers of a stage, "expert" for those of a group.
        firsts: the first number of each rank of that axis.
    """

    axis: str
    firsts: tuple[int, ...]

    def __post_init__(self):
        check_types(self)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where tensors of one kind belong.

    Args:
        match: regular expression of whole names, with named groups.
        to: path of the parameter; "{group}" stands for what a group matched, "{0}" for the name.
        cuts: from the innermost one on: the parts that the first cut made are joined first.
        kind: what several copies are that remain after the cuts, on ranks of other axes or under
            tied names: "unique" refuses them, "replicated" wants equal ones, "average" means them.
        stack: groups whose numbers are the first dims of the parameter.
        offsets: by group.
    """

    match: str
    to: str = "{0}"
    cuts: tuple[Cut, ...] = ()
    kind: Kind = "unique"
    stack: tuple[str, ...] = ()
    offsets: dict[str, Offset] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_types(self)
        groups = tree.compile_pattern("Rule.match", self.match).groupindex
        for name in (*self.stack, *self.offsets):
            if name not in groups:
                raise InputError("Rule.stack, offsets", name, f"a named group of {self.match!r}")


def load_rules(path: Path) -> tuple[Rule, ...]:
    """The rules in a TOML file; its tables have the fields of `Rule`, `Cut` and `Offset`.

    Raises:
        InputError: it is no such file.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError("rules", str(path), f"a TOML file ({error})") from None
    tables = content.get("rule", [])
    if set(content) != {"rule"} or not isinstance(tables, list):
        raise InputError("rules", str(path), "a file of [[rule]] tables")
    return tuple(_rule(table) for table in tables)


def _rule(table: Any) -> Rule:
    fields = _frozen(table)
    fields["cuts"] = tuple(_built(Cut, cut) for cut in table.get("cuts", ()))
    offsets = table.get("offsets", {})
    fields["offsets"] = {group: _built(Offset, offset) for group, offset in offsets.items()}
    return _built(Rule, fields)


def _built(kind: Any, table: Any) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(table) - names)
    if unknown:
        raise InputError(kind.__name__, unknown[0], f"one of {', '.join(sorted(names))}")
    required = {field.name for field in dataclasses.fields(kind) if _is_required(field)}
    missing = sorted(required - set(table))
    if missing:
        raise InputError(kind.__name__, dict(table), f"a table with {missing[0]}")
    return kind(**_frozen(table))


def _is_required(field: dataclasses.Field) -> bool:
    absent = dataclasses.MISSING
    return field.default is absent and field.default_factory is absent


def _frozen(table: Any) -> dict[str, Any]:
    """A table with tuples for its lists."""

    def freeze(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(freeze(item) for item in value)
        return value

    if not isinstance(table, dict):
        raise InputError("rules", table, "a table")
    return {name: freeze(value) for name, value in table.items()}
