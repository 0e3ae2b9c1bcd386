"""House rules, checked on the source: imports go down, and only certain modules may know a thing.

Each check is one test over all modules, whose failure lists every offender.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxscale"
KERNELS = ROOT / "kernels"
RANKS = {
    "kernels": 0,
    "config": 1,
    "described": 1,
    "bindings": 1,
    "signatures": 1,
    "written": 1,
    "overrides": 1,
    "renamed": 1,
    "types": 1,
    "verbs": 1,
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
    "__main__": 10,
}
FOUNDATION = 1  # modules of this rank may import each other
KERNELS_KNOW = {"jax", "jaxlib", "jax_triton", "triton", "numpy", "jaxscale"}
NOBODY_IMPORTS = {"experiments", "tests", "notebooks", "pickle", "kernels"}
VAGUE_NAMES = {"utils", "common", "misc", "helpers"}
MAX_LINES = 400
MAX_SCRIPT_LINES = 60
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
GIN_DECORATOR = re.compile(r"^\s*@gin\.", re.MULTILINE)
COMMENTED_OUT = re.compile(
    r"^\s*#\s*(def |import |from \w+ import |return )",
    re.MULTILINE,
)

# jaxscale/kernels is a link to kernels/, so the kernels would be found twice without `resolve`.
MODULES = sorted({path.resolve() for path in PACKAGE.rglob("*.py")} | set(KERNELS.rglob("*.py")))


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def num_lines(path: Path) -> int:
    return len(text_of(path).splitlines())


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """Package or module directly under jaxscale that a file belongs to; "" for its __init__.py."""
    if path.is_relative_to(KERNELS):
        return "kernels"
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in the file; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def our_rooms(path: Path) -> set[str]:
    """Rooms of jaxscale that a file imports."""
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("jaxscale.")}
    return ours & RANKS.keys()


def test_the_modules_are_found():
    assert {room(path) for path in MODULES} >= {"", "kernels", "models", "cli"}


def test_every_room_has_a_rank():
    assert {room(path) for path in MODULES} - {""} <= RANKS.keys()


def test_no_import_is_relative():
    """They would be invisible to the checks of this file."""
    offenders = [
        f"{shown(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not offenders, offenders


def test_imports_go_down():
    offenders = [
        f"{shown(path)} (rank {RANKS.get(room(path))}) imports {other} (rank {RANKS[other]})"
        for path in MODULES
        for other in sorted(our_rooms(path))
        if not may_import(room(path), other)
    ]
    assert not offenders, "\n".join(offenders)


def may_import(room: str, other: str) -> bool:
    if not room:  # jaxscale/__init__.py stands beneath everything
        return False
    if other == room or RANKS[other] < RANKS[room]:
        return True
    return RANKS[other] == RANKS[room] == FOUNDATION


def test_who_may_know_what():
    offenders = [
        f"{shown(path)}: {reason}" for path in MODULES for reason in forbidden_imports(path)
    ]
    assert not offenders, "\n".join(offenders)


def forbidden_imports(path: Path) -> Iterator[str]:
    """A sentence for each import that this module should leave to others."""
    packages, mine = imported_packages(path), room(path)
    if "gin" in packages and path != PACKAGE / "config.py":
        yield "only config.py imports gin"
    for package in sorted(packages & NOBODY_IMPORTS):
        yield f"nobody imports {package}"
    if mine not in ("cli", "__main__") and "cli" in our_rooms(path):
        yield "nobody imports cli"
    if mine not in ("ops", "kernels") and "kernels" in our_rooms(path):
        yield "only ops imports the kernels"
    if mine == "kernels":
        for package in sorted(packages - sys.stdlib_module_names - KERNELS_KNOW):
            yield f"a kernel knows jax and numpy, not {package}"


def test_no_name_is_vague():
    offenders = [
        shown(path)
        for path in MODULES
        if VAGUE_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    ]
    assert not offenders, offenders


def test_files_are_short():
    """The bodies of kernels may be longer: they cannot be cut where a reader would want it."""
    offenders = {
        shown(path): num_lines(path)
        for path in MODULES
        if room(path) != "kernels" and num_lines(path) >= MAX_LINES
    }
    assert not offenders, offenders


def test_experiments_are_short():
    scripts = (ROOT / "experiments").glob("*.py")
    lengths = {shown(path): num_lines(path) for path in scripts}
    offenders = {name: length for name, length in lengths.items() if length > MAX_SCRIPT_LINES}
    assert not offenders, offenders


def test_axes_are_named_by_constants_in_collectives():
    offenders = [
        f"{shown(path)}:{call.lineno}: {called_name(call)}({axis!r})"
        for path in MODULES
        if path != PACKAGE / "parallel" / "mesh.py"
        for call in ast.walk(parsed(path))
        if isinstance(call, ast.Call) and called_name(call) in COLLECTIVES
        for axis in literal_axes(call)
    ]
    assert not offenders, "\n".join(offenders)


def called_name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def literal_axes(call: ast.Call) -> list[str]:
    """Axis names that stand as string literals anywhere in the arguments of a call."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    nodes = [node for argument in arguments for node in ast.walk(argument)]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and node.value in AXES]


def test_what_is_public_has_a_docstring():
    offenders = [
        f"{shown(path)}: {name}" for path in MODULES for name in undocumented(parsed(path))
    ]
    assert not offenders, "\n".join(offenders)


def undocumented(module: ast.Module) -> list[str]:
    """Names without docstring; that of an interface's method also covers those that fill it in."""
    definitions = public_definitions(module)
    documented = {node.name for node in definitions if ast.get_docstring(node)}
    missing = sorted({node.name for node in definitions} - documented)
    return missing if ast.get_docstring(module) else ["the module", *missing]


def public_definitions(parent: ast.Module | ast.ClassDef) -> list:
    """Public functions and classes of a module and public methods of its public classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node for node in parent.body if isinstance(node, kinds) and node.name[0] != "_"]
    classes = [node for node in found if isinstance(node, ast.ClassDef)]
    return found + [method for node in classes for method in public_definitions(node)]


def test_nothing_is_commented_out_and_no_decorator_is_gins():
    offenders = [
        f"{shown(path)}: {found[0].strip()}"
        for path in MODULES
        for pattern in (GIN_DECORATOR, COMMENTED_OUT)
        for found in pattern.finditer(text_of(path))
    ]
    assert not offenders, "\n".join(offenders)
