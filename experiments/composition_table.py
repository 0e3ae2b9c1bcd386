"""Write the composition matrix, as the long tests recorded it.

Into docs/composition.md between its markers.

JAXSCALE_MATRIX=matrix.jsonl python -m pytest tests/parallel/test_composition.py \\
    -m "long or not long"
python experiments/composition_table.py matrix.jsonl
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "composition.md"
BEGIN, END = "<!-- composition matrix -->", "<!-- end of the composition matrix -->"
HEADER = """\
| mesh | dense, float64 | MoE, float64 | dense, float32 | MoE, float32 |
|---|---|---|---|---|"""


def describe(sizes):
    """A case as text: axes first, then what else differs from the default."""
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def table(lines):
    """Markdown, one row per mesh: the worst error of both models' losses and gradients.

    A mesh that was tried with one of them has an empty cell for the other.
    """
    cases = {}
    for line in lines:
        if line["model"] in ("dense", "moe"):
            case = cases.setdefault(describe(line["sizes"]), {})
            case[line["model"]] = line
    rows = [HEADER]
    for name, models in cases.items():
        cells = [name]
        for dtype in ("float64", "float32"):
            for model in ("dense", "moe"):
                cells.append(f"{models[model][dtype]:.0e}" if model in models else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(file):
    """Replace what stands between the markers; meshes with few axes come first."""
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    lines.sort(key=lambda line: len(line["sizes"]))
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(lines)}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
