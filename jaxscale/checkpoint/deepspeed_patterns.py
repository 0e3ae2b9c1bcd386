"""The patterns in a DeepSpeed checkpoint as rules: how tensor ranks cut each parameter.

Source: DeepSpeed's `universal_checkpoint_info`, lists of regular expressions that a training
program stores with its model. A name that no pattern matches is cut along dim 0.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxscale.checkpoint.patterns import Cut, Kind, Rule
from jaxscale.checkpoint.universal import Shard
from jaxscale.types import InputError

VOCABULARY = "vocabulary_parameter_patterns"
PIPELINE_REPLICATED = "pipeline_replicated_parameter_patterns"
REPLICATED = "tp_replicated_parameter_patterns"
AVERAGE = "parameter_to_average_patterns"
ROWS = "parameter_with_row_parallelism_patterns"
TWO_BLOCKS = "parameter_with_2_sub_params_cat_dim_0"
BLOCKS = "parameter_with_sub_params"
WIDTHS = "sub_param_shard_widths"
UNREAD = ("affine_map",)
ONE_RANK = (Rule(match="(?s).*"),)


def rules_of(info: dict[str, Any], shards: Sequence[Shard]) -> tuple[Rule, ...]:
    """A rule for each parameter.

    Args:
        info: the checkpoint's `universal_checkpoint_info`; empty where it has none.
        shards: of all tensor and pipeline ranks.
    Raises:
        InputError: several ranks hold parts and the checkpoint does not say of what, a name
            matches several patterns, or a pattern matches no name.
    """
    num_tensor = 1 + max(shard.ranks["tensor"] for shard in shards)
    if num_tensor == 1 and not info:
        return _whole(shards)
    if not info:
        expected = "universal_checkpoint_info in its model states, or rules of yours"
        raise InputError("checkpoint", f"{num_tensor} tensor ranks", expected)
    for name in UNREAD:
        if info.get(name):
            raise InputError("universal_checkpoint_info", name, "patterns that are read here")
    patterns = _Patterns(info)
    rules = tuple(patterns.rule(shard, num_tensor) for shard in _first_of_each(shards))
    patterns.check_all_used()
    return rules


def _first_of_each(shards: Sequence[Shard]) -> Iterator[Shard]:
    """The first shard of each name."""
    seen = set()
    for shard in shards:
        if shard.name not in seen:
            seen.add(shard.name)
            yield shard


def _whole(shards: Sequence[Shard]) -> tuple[Rule, ...]:
    """A rule for each parameter where no rank holds part of one.

    What several stages of a pipeline hold is tied, and the same in all of them.
    """
    stages: dict[str, set[int]] = {}
    for shard in shards:
        stages.setdefault(shard.name, set()).add(shard.ranks["pipeline"])
    rules = []
    for name, holders in stages.items():
        kind: Kind = "replicated" if len(holders) > 1 else "unique"
        rules.append(Rule(match=re.escape(name), to=_literal(name), kind=kind))
    return tuple(rules)


def _literal(name: str) -> str:
    return name.replace("{", "{{").replace("}", "}}")


class _Patterns:
    """The lists of patterns, which of them were used, and the rule that each makes."""

    def __init__(self, info: dict[str, Any]):
        self._info = info
        self._used: set[str] = set()

    def rule(self, shard: Shard, num_tensor: int) -> Rule:
        """The rule of one parameter."""
        name = shard.name
        kinds = (VOCABULARY, REPLICATED, AVERAGE, ROWS, TWO_BLOCKS)
        found = [kind for kind in kinds if self._is_in(kind, name)]
        blocks = [entry for entry in self._info.get(BLOCKS, ()) if self._matches(entry, name)]
        if len(found) + len(blocks) > 1:
            given = [*found, *(BLOCKS for _ in blocks)]
            raise InputError(name, given, "one list of patterns that it matches")
        is_replicated = self._is_in(PIPELINE_REPLICATED, name) or found == [REPLICATED]
        kind: Kind = "replicated" if is_replicated else "unique"
        cuts: tuple[Cut, ...] = ()
        if found == [AVERAGE]:
            kind = "average"
        elif found != [REPLICATED]:
            cuts = (self._cut(shard, num_tensor, found, blocks),)
        return Rule(match=re.escape(name), to=_literal(name), cuts=cuts, kind=kind)

    def check_all_used(self) -> None:
        """Raises InputError if a pattern matched no name."""
        given = set()
        for kind in (VOCABULARY, PIPELINE_REPLICATED, REPLICATED, AVERAGE, ROWS, TWO_BLOCKS):
            given |= set(self._info.get(kind, ()))
        for entry in self._info.get(BLOCKS, ()):
            given |= set(entry["patterns"])
        if unused := sorted(given - self._used):
            raise InputError("universal_checkpoint_info", unused[0], "a pattern that matches")

    def _is_in(self, kind: str, name: str) -> bool:
        return self._any(self._info.get(kind, ()), name)

    def _matches(self, entry: dict[str, Any], name: str) -> bool:
        return self._any(entry["patterns"], name)

    def _any(self, patterns: Sequence[str], name: str) -> bool:
        matching = {pattern for pattern in patterns if re.match(pattern, name)}
        self._used |= matching
        return bool(matching)

    def _cut(
        self,
        shard: Shard,
        num_tensor: int,
        found: list[str],
        blocks: list[dict[str, Any]],
    ) -> Cut:
        """How tensor ranks cut one parameter."""
        rows = shard.array.shape[0] * num_tensor if shard.array.shape else 0
        if found == [VOCABULARY]:
            return Cut("tensor", 0, size=self._info["original_vocab_size"])
        if found == [ROWS]:
            return Cut("tensor", 1)
        if found == [TWO_BLOCKS]:
            return Cut("tensor", 0, blocks=(rows // 2, rows // 2))
        if not blocks:
            return Cut("tensor", 0)
        dim = blocks[0]["partition_dim"]
        sizes = blocks[0]["shape"][dim]
        sizes = tuple(sizes) if isinstance(sizes, list | tuple) else (sizes,)
        widths = self._info.get(WIDTHS, {}).get(shard.name, ())
        return Cut("tensor", dim, blocks=sizes, widths=tuple(map(tuple, widths)))
