"""What a study came to: the tests' verdicts as a table, and its pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxscale.evaluate.equivalence import Comparison, mean_interval
from jaxscale.evaluate.routing import shares, similarity

Runs = Sequence[Mapping[str, Any]]
COLORS = ("#1f5a92", "#c4501b", "#3f9a57", "#7a5195", "#777777")


def verdict_table(found: Mapping[tuple[str, str], Comparison], names: Mapping[str, str]) -> str:
    """Markdown: a row a pair of arms; `names` maps arms to what readers call them."""
    rows = [
        "| held-out loss, nats a token | difference | 95 % interval | p of equivalence | verdict |",
        "|---" * 5 + "|",
    ]
    for (first, second), each in found.items():
        low, high = each.interval
        pair, interval = f"{names[first]} - {names[second]}", f"{low:+.4f} to {high:+.4f}"
        rows.append(
            f"| {pair} | {each.difference:+.4f} | {interval} | {each.p_equivalence:.2g} | {each.verdict} |"
        )
    return "\n".join(rows)


def loss_table(runs: Runs, names: Mapping[str, str]) -> str:
    """Markdown: a row an arm; mean over seeds and 95 % interval, then the mean of each domain."""
    domains = list(runs[0]["domains"])
    rows = [
        f"| arm | all domains | 95 % interval | {' | '.join(domains)} |",
        "|---" * (3 + len(domains)) + "|",
    ]
    for arm, name in names.items():
        own = _of(runs, arm)
        mean, (low, high) = mean_interval([run["loss"] for run in own])
        each = [np.mean([run["domains"][domain]["loss"] for run in own]) for domain in domains]
        rows.append(
            f"| {name} | {mean:.4f} | {low:.4f} to {high:.4f} | {' | '.join(f'{x:.3f}' for x in each)} |"
        )
    return "\n".join(rows)


def plot_losses_of_arms(
    runs: Runs,
    found: Mapping[tuple[str, str], Comparison],
    names: Mapping[str, str],
    path: Path,
    *,
    margin: float,
) -> None:
    """Draws each arm's held-out loss over the seeds, and the paired differences beside the margin, as a PNG."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for y, arm in enumerate(names):
        losses = [run["loss"] for run in _of(runs, arm)]
        mean, interval = mean_interval(losses)
        left.plot(
            losses, [y + 0.18] * len(losses), "o", color=COLORS[y], markersize=4, alpha=0.5, mew=0
        )
        left.plot(interval, [y, y], color=COLORS[y], linewidth=2)
        left.plot(mean, y, "D", color=COLORS[y], markersize=6)
    left.set(title="held-out loss: seeds, mean, 95 % interval", xlabel="nats per token")
    _rows(left, list(names.values()))
    right.axvspan(
        -margin, margin, color="#e3ecf4", label=f"margin of {margin} nats, fixed beforehand"
    )
    right.axvline(0, color="#444444", linewidth=0.8)
    for y, each in enumerate(found.values()):
        thin, thick = dict(linewidth=1.2), dict(linewidth=4, solid_capstyle="butt")
        right.plot(
            each.interval, [y, y], color="#444444", **thin, label=None if y else "95 % interval"
        )
        right.plot(
            each.inner_interval,
            [y, y],
            color="#444444",
            **thick,
            label=None if y else "90 %: inside is equivalent",
        )
        right.plot(each.difference, y, "D", color="white", mec="#444444", markersize=6)
        right.text(each.difference, y - 0.2, each.verdict, ha="center", va="bottom", fontsize=9)
    right.set(title="paired differences", xlabel="nats per token")
    _rows(right, [f"{names[first]} - {names[second]}" for first, second in found])
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def plot_loads(runs: Runs, names: Mapping[str, str], path: Path) -> None:
    """Draws the experts' shares of all held-out choices in each layer, experts by their share, as a PNG."""
    arms = [arm for arm in names if "load" in _first_domain(_of(runs, arm)[0])]
    figure = Figure(figsize=(3.6 * len(arms), 3.4), layout="constrained")
    for axes, arm in zip(
        figure.subplots(1, len(arms), sharey=True, squeeze=False)[0], arms, strict=True
    ):
        ranked = np.sort([shares(sum(_loads(run).values())) for run in _of(runs, arm)], -1)[
            ..., ::-1
        ]
        ranks = np.arange(1, ranked.shape[-1] + 1)
        for layer, (low, mean, high) in enumerate(
            zip(ranked.min(0), ranked.mean(0), ranked.max(0), strict=True)
        ):
            shade = 0.25 + 0.75 * layer / max(len(ranked[0]) - 1, 1)
            axes.plot(
                ranks,
                mean * 100,
                color=COLORS[0],
                alpha=shade,
                linewidth=1.3,
                label=f"layer {layer}",
            )
            axes.fill_between(
                ranks, low * 100, high * 100, color=COLORS[0], alpha=0.06, linewidth=0
            )
        axes.axhline(100 / len(ranks), color="#444444", linestyle=":", linewidth=1)
        axes.set(
            title=f"{names[arm]}\nlargest {ranked.max():.1%}",
            xlabel="expert, by its share",
            xticks=ranks[::3],
        )
        axes.set_ylim(0, None)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share of a layer's choices (%)")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_routing(runs: Runs, names: Mapping[str, str], path: Path, *, layer: int) -> None:
    """Draws where a layer sends each domain (first seed) and how alike the domains are in each layer (all seeds)."""
    arms = [arm for arm in names if "load" in _first_domain(_of(runs, arm)[0])]
    loads = {arm: _loads(_of(runs, arm)[0]) for arm in arms}
    tables = {
        arm: np.stack([shares(each[layer]) for each in loads[arm].values()]) * 100 for arm in arms
    }
    figure = Figure(figsize=(3.8 * len(arms), 5.6), layout="constrained")
    panels = figure.subplots(2, len(arms), squeeze=False, height_ratios=(1, 1.3), sharey="row")
    for (top, bottom), arm in zip(panels.T, arms, strict=True):
        picture = top.imshow(
            tables[arm], cmap="Blues", vmin=0, vmax=np.max(list(tables.values())), aspect="auto"
        )
        top.set(
            title=f"{names[arm]}, layer {layer}",
            xlabel="expert",
            xticks=range(0, tables[arm].shape[1], 3),
        )
        top.set(yticks=range(len(tables[arm])), yticklabels=list(loads[arm]))
        _plot_similarity(bottom, _of(runs, arm))
    figure.colorbar(picture, ax=panels[0, -1], label="% of a domain's choices")
    panels[1, 0].set_ylabel("cosine between two domains")
    lines, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=120)


def _plot_similarity(axes: Axes, runs: Runs) -> None:
    """One line a pair of domains, the mean over seeds."""
    domains = list(runs[0]["domains"])
    mean = np.mean([similarity(_loads(run)) for run in runs], 0)
    pairs = [(i, j) for i in range(len(domains)) for j in range(i)]
    for number, (i, j) in enumerate(pairs):
        style = ("-", "--")[number // len(COLORS) % 2]
        label = f"{domains[j]}, {domains[i]}"
        axes.plot(
            mean[:, i, j],
            style,
            marker="o",
            markersize=3,
            color=COLORS[number % len(COLORS)],
            label=label,
        )
    axes.set(
        xlabel="layer",
        xticks=range(len(mean)),
        title=f"mean {np.mean([mean[:, i, j] for i, j in pairs]):.3f}",
    )
    axes.grid(alpha=0.25)


def _rows(axes: Axes, labels: list[str]) -> None:
    """One label a row, first on top."""
    axes.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.6))
    axes.grid(alpha=0.25, axis="x")


def _of(runs: Runs, arm: str) -> list[Mapping[str, Any]]:
    return sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])


def _first_domain(run: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(run["domains"].values()))


def _loads(run: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Domain -> [MoE layers, E]."""
    return {name: np.asarray(figures["load"]) for name, figures in run["domains"].items()}
