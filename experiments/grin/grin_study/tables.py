"""What a study came to, as Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from grin_study.equivalence import Comparison, mean_interval
from grin_study.routing import shares
from grin_study.runs import Run, runs_of


def verdict_table(
    found: Mapping[tuple[str, str], Comparison],
    names: Mapping[str, str],
) -> str:
    """One row per pair of arms; `names` maps each arm to what readers call it."""
    columns = (
        "held-out loss, nats a token",
        "difference",
        "95 % interval",
        "p of equivalence",
        "verdict",
    )
    rows = _header(columns)
    for (first, second), comparison in found.items():
        low, high = comparison.interval
        cells = (
            f"{names[first]} - {names[second]}",
            f"{comparison.difference:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            f"{comparison.p_equivalence:.2g}",
            comparison.verdict,
        )
        rows.append(_row(cells))
    return "\n".join(rows)


def loss_table(
    runs: Sequence[Run],
    names: Mapping[str, str],
) -> str:
    """One row per arm: mean over seeds, 95 % interval, and the mean of each domain."""
    domains = list(runs[0]["domains"])
    rows = _header(["arm", "all domains", "95 % interval", *domains])
    for arm, name in names.items():
        of_arm = runs_of(runs, arm)
        mean, (low, high) = mean_interval([run["loss"] for run in of_arm])
        cells = [name, f"{mean:.4f}", f"{low:.4f} to {high:.4f}"]
        for domain in domains:
            of_domain = [run["domains"][domain]["loss"] for run in of_arm]
            cells.append(f"{np.mean(of_domain):.3f}")
        rows.append(_row(cells))
    return "\n".join(rows)


def routing_table(
    loads: Mapping[str, np.ndarray],
    layer: int,
) -> str:
    """One row per domain, one column per expert: shares of the domain's choices in one layer."""
    num_experts = len(next(iter(loads.values()))[layer])
    rows = _header(["domain", *map(str, range(num_experts))])
    for domain, load in loads.items():
        percentages = [f"{share:.1%}" for share in shares(load[layer])]
        rows.append(_row([domain, *percentages]))
    return "\n".join(rows)


def _header(columns: Sequence[str]) -> list[str]:
    return [_row(columns), "|---" * len(columns) + "|"]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
