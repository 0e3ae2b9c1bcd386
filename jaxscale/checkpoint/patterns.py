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
import string
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
        _check_least("Cut.dim", (self.dim,), 0)
        _check_least("Cut.size", () if self.size is None else (self.size,), 1)
        _check_least("Cut.blocks", self.blocks, 1)
        for widths in self.widths:
            _check_least("Cut.widths", widths, 0)  # a rank may have no row of a block
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
        _check_least("Offset.firsts", self.firsts, 0)


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter that a tensor, or some rows of it, becomes.

    Args:
        to: path of the parameter; "{group}" stands for what a group matched, "{0}" for the name.
        rows: how many rows of dim 0 it has of the joined tensor; None for all.
        axes: for each dim of the parameter, which dim of the tensor it is, as a matrix of torch is
            [out, in]; empty for the same order.
        shape: sizes of the parameter where dims are divided, such as (D, N, H) of [D, N H]; empty
            where none is.
    """

    to: str
    rows: int | None = None
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def __post_init__(self):
        check_types(self)
        _check_least("Target.rows", () if self.rows is None else (self.rows,), 1)
        _check_least("Target.shape", self.shape, 1)
        _check_path(self.to)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where tensors of one kind belong.

    Args:
        match: regular expression of whole names, with named groups.
        to, axes, shape: of the one parameter, see `Target`.
        cuts: from the innermost one on: the parts that the first cut made are joined first.
        targets: in place of `to`, where the joined tensor is several parameters one after the
            other, such as q, k and v.
        kind: what several copies are that remain after the cuts, on ranks of other axes or under
            tied names: "unique" refuses them, "replicated" wants equal ones, "average" means them.
        stack: groups whose numbers are the first dims of the parameter.
        offsets: by group.
    """

    match: str
    to: str = "{0}"
    cuts: tuple[Cut, ...] = ()
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    targets: tuple[Target, ...] = ()
    kind: Kind = "unique"
    stack: tuple[str, ...] = ()
    offsets: dict[str, Offset] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_types(self)
        groups = tree.compile_pattern("Rule.match", self.match).groupindex
        for name in (*self.stack, *self.offsets):
            if name not in groups:
                raise InputError("Rule.stack, offsets", name, f"a named group of {self.match!r}")
        _check_path(self.to)
        _check_least("Rule.shape", self.shape, 1)

    @property
    def becomes(self) -> tuple[Target, ...]:
        """The parameters that a tensor becomes."""
        return self.targets or (Target(self.to, None, self.axes, self.shape),)


def _check_least(parameter: str, numbers: tuple[int, ...], least: int) -> None:
    """Raises InputError if a number is below the least that means something."""
    if min(numbers, default=least) < least:
        raise InputError(parameter, numbers, f"numbers of at least {least}")


def _check_path(to: str) -> None:
    """Raises InputError unless a path is text with names in braces, without anything after them."""
    try:
        fields = list(string.Formatter().parse(to))
    except ValueError as error:
        raise InputError("Rule.to", to, f"a path with names in braces ({error})") from None
    for _, name, layout, conversion in fields:
        is_plain = name is None or name == "0" or name.isidentifier()
        if not is_plain or layout or conversion:
            raise InputError("Rule.to", to, "a path with names of groups, or 0, in braces")


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
    fields["targets"] = tuple(_built(Target, target) for target in table.get("targets", ()))
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
