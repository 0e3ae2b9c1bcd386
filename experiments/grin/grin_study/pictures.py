"""What a study came to, as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from grin_study.equivalence import Comparison, mean_interval
from grin_study.routing import shares, similarity
from grin_study.runs import Run, has_experts, loads_by_domain, runs_of

COLORS = ("#1f5a92", "#c4501b", "#3f9a57", "#7a5195", "#777777")
BLUE = COLORS[0]
GREY = "#444444"


def plot_losses_of_arms(
    runs: Sequence[Run],
    found: Mapping[tuple[str, str], Comparison],
    names: Mapping[str, str],
    path: Path,
    *,
    margin: float,
) -> None:
    """Draw each arm's held-out losses, and the paired differences beside the margin, as a PNG.

    Args:
        runs: of all arms.
        found: what `compare_arms` returned.
        names: arm -> what readers call it.
        path: of the picture.
        margin: nats per token.
    """
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _plot_losses(left, runs, names)
    _plot_differences(right, list(found.values()), margin)
    _label_rows(right, [f"{names[first]} - {names[second]}" for first, second in found])
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _plot_losses(
    axes: Axes,
    runs: Sequence[Run],
    names: Mapping[str, str],
) -> None:
    """One row per arm: a dot for each seed, below it the mean with its interval."""
    dots = dict(markersize=4, alpha=0.5, mew=0)
    for row, arm in enumerate(names):
        color = COLORS[row]
        losses = [run["loss"] for run in runs_of(runs, arm)]
        mean, interval = mean_interval(losses)
        axes.plot(
            losses,
            [row + 0.18] * len(losses),
            "o",
            color=color,
            **dots,
        )
        axes.plot(interval, [row, row], color=color, linewidth=2)
        axes.plot(mean, row, "D", color=color, markersize=6)
    axes.set(title="held-out loss: seeds, mean, 95 % interval", xlabel="nats per token")
    _label_rows(axes, list(names.values()))


def _plot_differences(
    axes: Axes,
    comparisons: Sequence[Comparison],
    margin: float,
) -> None:
    """One row per pair: its difference, both confidence intervals and the verdict."""
    shade = f"margin of {margin} nats, fixed beforehand"
    axes.axvspan(-margin, margin, color="#e3ecf4", label=shade)
    axes.axvline(0, color=GREY, linewidth=0.8)
    thin = dict(color=GREY, linewidth=1.2)
    thick = dict(color=GREY, linewidth=4, solid_capstyle="butt")
    for row, each in enumerate(comparisons):
        # Only the first row's lines get a label, so that the legend names each kind once.
        outer, inner = (None, None) if row else ("95 % interval", "90 %: inside is equivalent")
        axes.plot(
            each.interval,
            [row, row],
            label=outer,
            **thin,
        )
        axes.plot(
            each.inner_interval,
            [row, row],
            label=inner,
            **thick,
        )
        axes.plot(
            each.difference,
            row,
            "D",
            color="white",
            mec=GREY,
            markersize=6,
        )
        axes.text(
            each.difference,
            row - 0.2,
            each.verdict,
            ha="center",
            va="bottom",
            fontsize=9,
        )
    axes.set(title="paired differences", xlabel="nats per token")


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows, the first on top."""
    num_rows = len(labels)
    axes.set(yticks=range(num_rows), yticklabels=labels, ylim=(num_rows - 0.5, -0.6))
    axes.grid(alpha=0.25, axis="x")


def plot_loads(
    runs: Sequence[Run],
    names: Mapping[str, str],
    path: Path,
) -> None:
    """Draw the experts' shares of all held-out choices in each layer, largest first, as a PNG.

    Args: as `plot_losses_of_arms`; an arm without experts is left out.
    """
    arms = [arm for arm in names if has_experts(runs, arm)]
    figure = Figure(figsize=(3.6 * len(arms), 3.4), layout="constrained")
    panels = figure.subplots(
        1,
        len(arms),
        sharey=True,
        squeeze=False,
    )[0]
    for axes, arm in zip(panels, arms, strict=True):
        of_runs = [_shares_over_domains(run) for run in runs_of(runs, arm)]
        ranked = np.sort(of_runs, axis=-1)[..., ::-1]
        _plot_ranked_shares(axes, ranked)
        axes.set_title(f"{names[arm]}\nlargest {ranked.max():.1%}")
    figure.axes[0].set_ylabel("share of a layer's choices (%)")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _shares_over_domains(run: Run) -> np.ndarray:
    """[MoE layers, E] shares of the choices of all domains together."""
    return shares(sum(loads_by_domain(run).values()))


def _plot_ranked_shares(axes: Axes, ranked: np.ndarray) -> None:
    """One line per layer, the mean over runs, with a band from the lowest to the highest run.

    Args:
        ranked: [runs, MoE layers, E] shares, sorted from the largest.
    """
    _, num_layers, num_experts = ranked.shape
    ranks = np.arange(1, num_experts + 1)
    percent = 100 * ranked
    for layer in range(num_layers):
        of_layer = percent[:, layer]
        alpha = 0.25 + 0.75 * layer / max(num_layers - 1, 1)
        line = dict(color=BLUE, alpha=alpha, linewidth=1.3)
        band = dict(color=BLUE, alpha=0.06, linewidth=0)
        axes.plot(ranks, of_layer.mean(0), label=f"layer {layer}", **line)
        axes.fill_between(
            ranks,
            of_layer.min(0),
            of_layer.max(0),
            **band,
        )
    axes.axhline(100 / num_experts, color=GREY, linestyle=":", linewidth=1)
    axes.set(xlabel="expert, by its share", xticks=ranks[::3])
    axes.set_ylim(0, None)
    axes.grid(alpha=0.25)


def plot_routing(
    runs: Sequence[Run],
    names: Mapping[str, str],
    path: Path,
    *,
    layer: int,
) -> None:
    """Draw where a layer sends each domain, and how alike the domains are in every layer.

    The upper row shows the first seed, the lower row the mean over all seeds.

    Args: as `plot_loads`; `layer` is counted among the MoE layers.
    """
    arms = [arm for arm in names if has_experts(runs, arm)]
    tables = {}
    for arm in arms:
        first_run = runs_of(runs, arm)[0]
        of_layer = [shares(load[layer]) for load in loads_by_domain(first_run).values()]
        tables[arm] = 100 * np.stack(of_layer)
    largest = max(table.max() for table in tables.values())
    figure = Figure(figsize=(3.8 * len(arms), 5.6), layout="constrained")
    panels = figure.subplots(
        2,
        len(arms),
        squeeze=False,
        height_ratios=(1, 1.3),
        sharey="row",
    )
    for (upper, lower), arm in zip(panels.T, arms, strict=True):
        of_arm = runs_of(runs, arm)
        image = _plot_table(
            upper,
            tables[arm],
            list(of_arm[0]["domains"]),
            largest,
        )
        upper.set_title(f"{names[arm]}, layer {layer}")
        _plot_similarity(lower, of_arm)
    figure.colorbar(image, ax=panels[0, -1], label="% of a domain's choices")
    panels[1, 0].set_ylabel("cosine between two domains")
    lines, labels = panels[1, 0].get_legend_handles_labels()
    place = dict(loc="outside lower center", ncols=len(labels))
    figure.legend(lines, labels, frameon=False, fontsize=9, **place)
    figure.savefig(path, dpi=120)


def _plot_table(
    axes: Axes,
    table: np.ndarray,
    domains: list[str],
    largest: float,
) -> AxesImage:
    """A cell per domain and expert, with one color scale from 0 to `largest` for all tables."""
    image = axes.imshow(
        table,
        cmap="Blues",
        vmin=0,
        vmax=largest,
        aspect="auto",
    )
    axes.set(xlabel="expert", xticks=range(0, table.shape[1], 3))
    axes.set(yticks=range(len(domains)), yticklabels=domains)
    return image


def _plot_similarity(axes: Axes, runs: Sequence[Run]) -> None:
    """One line per pair of domains, the mean over seeds."""
    domains = list(runs[0]["domains"])
    of_runs = [similarity(loads_by_domain(run)) for run in runs]
    mean = np.mean(of_runs, axis=0)
    pairs = [(i, j) for i in range(len(domains)) for j in range(i)]
    for number, (i, j) in enumerate(pairs):
        color = COLORS[number % len(COLORS)]
        # Once the colors are used up they start again with a dashed line.
        style = ("-", "--")[number // len(COLORS) % 2]
        marked = dict(marker="o", markersize=3, color=color)
        axes.plot(
            mean[:, i, j],
            style,
            label=f"{domains[j]}, {domains[i]}",
            **marked,
        )
    over_pairs = np.mean([mean[:, i, j] for i, j in pairs])
    axes.set(xlabel="layer", xticks=range(len(mean)), title=f"mean {over_pairs:.3f}")
    axes.grid(alpha=0.25)
