"""What a run asks to be other in its state than in the checkpoint that it goes on from."""

import dataclasses
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxscale import tree
from jaxscale.checkpoint.loading import load
from jaxscale.checkpoint.matching import check_leaves
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.types import InputError, check_types

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Changes:
    """What may differ; everything else that does is refused, and so is a pattern in vain.

    Args:
        drawn: regular expression over whole paths of the run's state, such as
            "params/.*/lora_.*|opt_state/.*": leaves that are drawn as in a new run though the
            checkpoint has others of that name, or has none.
        left_out: regular expression over whole paths of the checkpoint's state: leaves that are not
            read, such as a head that is dropped.
        is_cast: leaves may be of any other type; they are cast. A wider one needs no asking.
    """

    drawn: str | None = None
    left_out: str | None = None
    is_cast: bool = False

    def __post_init__(self):
        check_types(self)
        for name in ("drawn", "left_out"):
            tree.compile_pattern(f"Changes.{name}", getattr(self, name) or "")

    def kept(self, saved: Iterable[str], wanted: Iterable[str]) -> tuple[set[str], set[str]]:
        """The paths of the checkpoint that are to be read, and those of the run that are read.

        Args:
            saved: paths of the checkpoint's leaves.
            wanted: paths of the run's leaves.
        Returns:
            (those of the checkpoint without what is left out or drawn, those of the run without
            what is drawn).
        Raises:
            InputError: a pattern matches nothing.
        """
        saved, wanted = set(saved), set(wanted)
        drawn = _matching("Changes.drawn", self.drawn, wanted)
        left_out = _matching("Changes.left_out", self.left_out, saved)
        return saved - left_out - drawn, wanted - drawn


def load_changed(
    path: Path,
    abstract_state: Any,
    changes: Changes,
    *,
    budget_bytes: int,
) -> Any:
    """The state of a committed step but for what is drawn anew, in whose place is None.

    Args:
        path: of the step.
        abstract_state: tree of jax.ShapeDtypeStruct with shardings, on any mesh.
        changes: what may differ.
        budget_bytes: of host memory beyond the arrays.
    Raises:
        InputError: something differs that `changes` does not name.
    """
    leaves = NativeCheckpoint(path).leaves()
    wanted = tree.flatten(abstract_state)
    read, restored = changes.kept(leaves, wanted)
    check_leaves(
        {name: leaves[name] for name in read},
        {name: wanted[name] for name in restored},
        str(path),
        is_cast_allowed=changes.is_cast,
    )

    def kept(name: str, leaf: Any) -> Any:
        return leaf if name in restored else None

    abstract = tree.map_with_path(kept, abstract_state)
    logger.info("%s: drawn anew are %s", path, sorted(set(wanted) - restored) or "none")
    logger.info("%s: left out are %s", path, sorted(set(leaves) - read) or "none")
    return load(leaves, abstract, budget_bytes=budget_bytes)


def _matching(parameter: str, pattern: str | None, paths: set[str]) -> set[str]:
    if pattern is None:
        return set()
    found = {path for path in paths if re.fullmatch(pattern, path)}
    if not found:
        raise InputError(parameter, pattern, "a pattern that matches some leaf's path")
    return found
