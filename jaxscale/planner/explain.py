"""What a search found as text: the ranked table, why losers lose, and one layout in full."""

from collections.abc import Sequence

from jaxscale.parallel.mesh import AXES, TENSOR
from jaxscale.planner.job import Layout
from jaxscale.planner.search import Candidate

GIB = 2**30


def layout_text(layout: Layout) -> str:
    """A layout in one line: the axes above 1, then how they are used."""
    mesh = layout.mesh
    axes = [f"{name} {size}" for name, size in zip(AXES, mesh.sizes) if size > 1]
    words = [*axes, f"zero {mesh.zero}"] if mesh.data * mesh.sequence > 1 else axes
    if mesh.ring > 1:
        words.append("ring")
    if mesh.expert_axis == TENSOR:
        words.append("experts by tensor")
    if mesh.pipeline > 1:
        words.append(mesh.schedule)
    if mesh.stage_periods is not None:
        words.append(f"periods {'-'.join(map(str, mesh.stage_periods))}")
    if mesh.is_optimizer_on_host:
        words.append("moments on the host")
    words.append(f"M {layout.num_microbatches}")
    words.append(f"remat {layout.remat}{', scanned' if layout.is_scanned else ''}")
    return ", ".join(words)


def why(candidate: Candidate, best: Candidate) -> str:
    """Why a candidate loses: what it needs too much, or the part of its step that grew most."""
    if not candidate.fits:
        over = candidate.memory.total - candidate.limit_bytes
        parts = candidate.memory.parts()
        largest = max(parts, key=parts.__getitem__)
        return (
            f"does not fit: {over / GIB:.1f} GiB too many; most are {largest}, "
            f"{parts[largest] / GIB:.1f} GiB"
        )
    if candidate is best:
        return "best"
    slower = candidate.time.total / best.time.total - 1
    names = {**best.time.parts, **candidate.time.parts}
    grown = {
        name: candidate.time.parts.get(name, 0.0) - best.time.parts.get(name, 0.0) for name in names
    }
    name = max(grown, key=grown.__getitem__)
    if grown[name] <= 0:
        return "as fast"
    return f"{slower:.1%} slower: {name} +{grown[name] * 1e3:.1f} ms"


def table(candidates: Sequence[Candidate], best: Candidate) -> str:
    """Candidates as rows: rank, milliseconds, memory, layout and why it loses."""
    rows = [("", "ms", "GiB", "layout", "")]
    for number, each in enumerate(candidates, 1):
        milliseconds, gib = f"{each.time.total * 1e3:.1f}", f"{each.memory.total / GIB:.1f}"
        rows.append((str(number), milliseconds, gib, layout_text(each.layout), why(each, best)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(width) if index < 3 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in aligned)


def details(candidate: Candidate) -> str:
    """Where the time and the memory of one layout go."""
    lines = [layout_text(candidate.layout)]
    parts = {name: value for name, value in candidate.time.parts.items() if value > 0}
    lines += [f"  {name:<12} {value * 1e3:>10.1f} ms" for name, value in parts.items()]
    lines.append(f"  {'step':<12} {candidate.time.total * 1e3:>10.1f} ms")
    sizes = {name: size for name, size in candidate.memory.parts().items() if size > 0}
    lines += [f"  {name:<12} {size / GIB:>10.2f} GiB" for name, size in sizes.items()]
    lines.append(
        f"  {'memory':<12} {candidate.memory.total / GIB:>10.2f} GiB of "
        f"{candidate.limit_bytes / GIB:.2f} GiB"
    )
    return "\n".join(lines)
