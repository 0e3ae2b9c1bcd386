"""The table and the curves of what fastgen.py printed.

python experiments/bench/fastgen_draw.py POINTS.log ... experiments/results/NAME.png

A request meets the SLA m if its first token comes within m times what one takes with one client of
splitfuse, by prompt token, and if the moving average of the times between its tokens never exceeds
m times the median of that client's. FastGen's own is one of 512 prompt tokens and 4 tokens a second
(arXiv 2401.08671, section 4).
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

MULTIPLES = (2, 3, 5)
OWN = (1 / 512, 1 / 4)  # seconds a prompt token, and a token
HEAD = "| policy | clients | requests/s | first token, ms | token, ms | P95 of tokens, ms |"


def share(point, first, token):
    """The share of a point's requests that meet an SLA in seconds a prompt token, and a token."""
    is_first = np.array(point["first"]) <= first * np.array(point["prompt"])
    return (is_first & (np.array(point["average"]) <= token)).mean()


def add_effective(points):
    """Puts the effective rate of each SLA into the points of one pair of lengths."""
    alone = next(p for p in points if p["policy"] == "splitfuse" and p["clients"] == 1)
    first = np.median(np.array(alone["first"]) / alone["prompt"])
    for point in points:
        slas = [(m * first, m * alone["token_median"]) for m in MULTIPLES]
        rate = point["requests_per_s"]
        point["effective"] = [rate * share(point, *sla) for sla in (*slas, OWN)]


def rows(points):
    """Lines of a table in Markdown."""
    slas = " | ".join(f"effective at SLA {m}" for m in (*MULTIPLES, "of FastGen"))
    yield f"{HEAD} {slas} |"
    yield "|---" * 10 + "|"
    for p in points:
        seconds = np.median(p["first"]), p["token_median"], p["token_p95"]
        cells = [p["requests_per_s"], *(1e3 * s for s in seconds), *p["effective"]]
        figures = " | ".join(f"{cell:.2f}" for cell in cells)
        yield f"| {p['policy']} | {p['clients']} | {figures} |"


def draw(column, points):
    """Three curves of each policy."""
    for policy in dict.fromkeys(p["policy"] for p in points):
        own = [p for p in points if p["policy"] == policy]
        rates, clients = ([p[name] for p in own] for name in ("requests_per_s", "clients"))
        column[0].plot(rates, [np.median(p["whole"]) for p in own], "o-", label=policy)
        column[1].plot(rates, [1e3 * p["token_p95"] for p in own], "o-", label=policy)
        for number, style in enumerate((":", "--", "-")):
            label = f"{policy}, SLA {MULTIPLES[number]}"
            effective = [p["effective"][number] for p in own]
            color = column[0].lines[-1].get_color()
            column[2].plot(clients, effective, style, marker=".", color=color, label=label)
    titles = "median of a request, s", "P95 between tokens, ms", "effective requests/s"
    for axes, title, x in zip(column, titles, ("requests/s", "requests/s", "clients"), strict=True):
        axes.set(ylabel=title, xlabel=x, xscale="log" if x == "clients" else "linear")
        axes.grid(alpha=0.3)
    column[2].legend(fontsize=7)
    column[0].legend(fontsize=7)


def main():
    text = "\n".join(Path(name).read_text() for name in sys.argv[1:-1])
    points = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    groups = {}
    for point in points:
        groups.setdefault(tuple(point["lengths"]), []).append(point)
    figure, columns = plt.subplots(3, len(groups), figsize=(4.2 * len(groups), 9), squeeze=False)
    for number, (lengths, own) in enumerate(groups.items()):
        own.sort(key=lambda p: (p["policy"] != "splitfuse", p["clients"]))
        add_effective(own)
        print(f"\nPrompts of {lengths[0]}, {lengths[1]} new tokens\n", *rows(own), sep="\n")
        draw(columns[:, number], own)
        columns[0, number].set_title(f"{lengths[0]} and {lengths[1]} tokens")
    figure.tight_layout()
    figure.savefig(sys.argv[-1], dpi=100)


if __name__ == "__main__":
    main()
