"""The table and the curves of what fastgen.py printed.

python experiments/bench/fastgen_draw.py POINTS.jsonl experiments/results/NAME.png
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLUMNS = {
    "requests/s": "requests_per_s",
    "first token, ms": "first_token_ms",
    "token, ms": "token_ms",
    "P95 of tokens, ms": "token_p95_ms",
    "effective at SLA 2": "effective_at_2",
    "3": "effective_at_3",
    "5": "effective_at_5",
}


def main():
    lines = Path(sys.argv[1]).read_text().splitlines()
    points = [json.loads(line) for line in lines if line.startswith("{")]
    print("| policy | clients |", *(f"{name} |" for name in COLUMNS))
    print("|---|---|" + "---|" * len(COLUMNS))
    for point in points:
        cells = (f"{point[field]:.2f} |" for field in COLUMNS.values())
        print(f"| {point['policy']} | {point['clients']} |", *cells)
    figure, (first, tokens) = plt.subplots(1, 2, figsize=(9, 3.5))
    for policy in dict.fromkeys(point["policy"] for point in points):
        own = [point for point in points if point["policy"] == policy]
        rates = [point["requests_per_s"] for point in own]
        for axes, field in ((first, "first_token_ms"), (tokens, "token_p95_ms")):
            axes.plot(rates, [point[field] for point in own], "o-", label=policy)
    for axes, title in ((first, "first token, median, ms"), (tokens, "a token, P95, ms")):
        axes.set(xlabel="requests/s", title=title, yscale="log")
        axes.grid(alpha=0.3)
    first.legend()
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
