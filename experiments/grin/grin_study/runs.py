"""The runs of a study, as `arms.run_seed` describes them: one JSON line each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grin_study.equivalence import Comparison, compare_paired
from jaxscale.types import InputError

Run = Mapping[str, Any]


def read_runs(path: Path) -> list[Run]:
    """All runs of a file of JSON lines."""
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines]


def runs_of(
    runs: Sequence[Run],
    arm: str,
) -> list[Run]:
    """The runs of one arm, in the order of their seeds."""
    of_arm = [run for run in runs if run["arm"] == arm]
    return sorted(of_arm, key=lambda run: run["seed"])


def has_experts(runs: Sequence[Run], arm: str) -> bool:
    """Whether an arm is a mixture of experts, so that its runs have loads."""
    domains = runs_of(runs, arm)[0]["domains"]
    return all("load" in figures for figures in domains.values())


def loads_by_domain(run: Run) -> dict[str, np.ndarray]:
    """Domain -> [MoE layers, E] choices of a mixture of experts."""
    loads = {}
    for domain, figures in run["domains"].items():
        loads[domain] = np.asarray(figures["load"])
    return loads


def compare_arms(
    runs: Sequence[Run], pairs: Sequence[tuple[str, str]], *, margin: float
) -> dict[tuple[str, str], Comparison]:
    """Compare the held-out losses of each pair of arms over the seeds that both have.

    Args:
        runs: what `run_seed` returned.
        pairs: (first, second); the difference is first - second.
        margin: nats per token.
    Raises:
        InputError: an arm has two runs of one seed.
    """
    losses = _losses_by_seed(runs)
    found = {}
    for first, second in pairs:
        of_first, of_second = losses[first], losses[second]
        seeds = sorted(of_first.keys() & of_second.keys())
        found[first, second] = compare_paired(
            [of_first[seed] for seed in seeds],
            [of_second[seed] for seed in seeds],
            margin=margin,
        )
    return found


def _losses_by_seed(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """Arm -> seed -> held-out loss."""
    losses: dict[str, dict[int, float]] = {}
    for run in runs:
        arm, seed = run["arm"], run["seed"]
        of_arm = losses.setdefault(arm, {})
        if seed in of_arm:
            raise InputError(
                "runs", f"two of arm {arm!r} and seed {seed}", "one run an arm and seed"
            )
        of_arm[seed] = run["loss"]
    return losses
