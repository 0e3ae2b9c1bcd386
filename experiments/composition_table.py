"""Writes the composition matrix into the README, between its markers, from what the long tests recorded.

JAXSCALE_MATRIX=matrix.jsonl python -m pytest tests/parallel/test_composition.py -m "long or not
long" python experiments/composition_table.py matrix.jsonl
"""

import json
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- composition matrix -->", "<!-- end of the composition matrix -->"


def describe(sizes):
    """A case as text: axes first, then what else differs from the default."""
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def table(lines):
    """Markdown rows, one a mesh, the worst error of both models' losses and gradients."""
    cases = {}
    for line in (line for line in lines if line["model"] in ("dense", "moe")):
        cases.setdefault(describe(line["sizes"]), {})[line["model"]] = line
    rows = [
        "| mesh | dense, float64 | MoE, float64 | dense, float32 | MoE, float32 |",
        "|---|---|---|---|---|",
    ]
    for case, models in cases.items():
        figures = [
            f"{models[m][dtype]:.0e}" for dtype in ("float64", "float32") for m in ("dense", "moe")
        ]
        rows.append(f"| {case} | {' | '.join(figures)} |")
    return "\n".join(rows)


def main(file):
    """Replaces what stands between the markers."""
    lines = sorted(
        (json.loads(line) for line in Path(file).read_text().splitlines()),
        key=lambda x: len(x["sizes"]),
    )
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table(lines)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main(sys.argv[1])
