"""The house rules that a reader relies on, checked on the source: imports go down, and who may know what."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxscale"
RANKS = {
    "kernels": 0,
    "config": 1,
    "bindings": 1,
    "signatures": 1,
    "written": 1,
    "overrides": 1,
    "renamed": 1,
    "types": 1,
    "tree": 1,
    "ops": 2,
    "data": 2,
    "parallel": 3,
    "launch": 3,
    "models": 4,
    "checkpoint": 4,
    "train": 5,
    "serve": 5,
    "convert": 5,
    "evaluate": 6,
    "planner": 6,
    "rlhf": 7,
    "run": 8,
    "cli": 9,
}
FOUNDATION = 1  # modules of this rank may import each other
KERNELS_KNOW = {"jax", "jaxlib", "jax_triton", "triton", "numpy"}
VAGUE_NAMES = {"utils", "common", "misc", "helpers"}
MAX_LINES = 400
AXES = {"pipeline", "data", "expert", "sequence", "tensor"}
COLLECTIVES = {
    "all_gather",
    "all_to_all",
    "axis_index",
    "axis_size",
    "pcast",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "pshuffle",
    "psum",
    "psum_scatter",
    "ragged_all_to_all",
}


MODULES = sorted(
    {path.resolve() for folder in (PACKAGE, ROOT / "kernels") for path in folder.rglob("*.py")}
)


def each_module(test):
    return pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))(
        test
    )


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room(path: Path) -> str:
    """The package or module directly under jaxscale that a file belongs to; empty for jaxscale/__init__.py."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in the file; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def our_rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("jaxscale.")} & (
        RANKS.keys()
    )


@each_module
def test_imports_go_down(path):
    mine = room(path)
    if not mine:
        assert not our_rooms(path)
        return
    for other in our_rooms(path) - {mine}:
        same_foundation = RANKS[other] == RANKS[mine] == FOUNDATION
        assert RANKS[other] < RANKS[mine] or same_foundation, (
            f"{mine} ({RANKS[mine]}) imports {other} ({RANKS[other]})"
        )


def test_every_room_has_a_rank():
    assert {room(path) for path in MODULES} - {""} <= RANKS.keys()


@each_module
def test_who_may_know_what(path):
    outside = {name.split(".")[0] for name in imports(path)}
    mine = room(path)
    assert "gin" not in outside or path == PACKAGE / "config.py"
    assert not outside & {"experiments", "tests", "notebooks", "pickle", "kernels"}
    if mine != "cli":
        assert "cli" not in our_rooms(path)
    if mine not in ("ops", "kernels"):
        assert "kernels" not in our_rooms(path)
    if mine == "kernels":
        assert outside - sys.stdlib_module_names - {"jaxscale"} <= KERNELS_KNOW


@each_module
def test_names_and_sizes(path):
    assert not VAGUE_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    if room(path) != "kernels":
        assert len(path.read_text().splitlines()) < MAX_LINES


def test_experiments_are_short():
    scripts = [
        path
        for path in (ROOT / "experiments").glob("*.py")
        if len(path.read_text().splitlines()) > 60
    ]
    assert not scripts


@each_module
def test_axes_are_named_by_constants_in_collectives(path):
    if path == PACKAGE / "parallel" / "mesh.py":
        return
    for call in [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]:
        if _called_name(call) in COLLECTIVES:
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            literals = {
                node.value
                for each in arguments
                for node in ast.walk(each)
                if isinstance(node, ast.Constant)
            } & AXES
            assert not literals, f"line {call.lineno}: {_called_name(call)}({literals})"


def _called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


@each_module
def test_what_is_public_has_a_docstring(path):
    tree = parsed(path)
    assert ast.get_docstring(tree), "the module"
    definitions = _public_definitions(tree)
    documented = {node.name for node in definitions if ast.get_docstring(node)}
    assert (
        not {node.name for node in definitions} - documented
    )  # a method's interface may document it for the others


def _public_definitions(parent) -> list:
    """Public functions and classes of a module and public methods of its public classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [
        node for node in parent.body if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    return found + [
        method
        for node in found
        if isinstance(node, ast.ClassDef)
        for method in _public_definitions(node)
    ]


@each_module
def test_nothing_commented_out_and_no_gin_decorators(path):
    text = path.read_text()
    assert not re.search(r"^\s*@gin\.", text, re.MULTILINE)
    assert not re.search(r"^\s*#\s*(def |import |from \w+ import |return )", text, re.MULTILINE)
