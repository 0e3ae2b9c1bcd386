"""Scripts under experiments import what is there; most of them need a GPU or another's package."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
# It imports what an earlier checkout of the library had, too.
OF_TWO_CHECKOUTS = EXPERIMENTS / "bench/ground_worker.py"
SCRIPTS = sorted(set(EXPERIMENTS.rglob("*.py")) - {OF_TWO_CHECKOUTS})


def defined_in(path: Path) -> set[str]:
    """The names that a script's own top level defines or imports."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        else:
            stored = (each for each in ast.walk(node) if isinstance(each, ast.Name))
            names |= {each.id for each in stored if isinstance(each.ctx, ast.Store)}
    return names


def is_there(module: str, name: str) -> bool:
    """Whether one of our modules is there and has this name."""
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        return importlib.util.find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError:
        return False


def missing_names(path: Path) -> list[str]:
    """What a script imports of the library, or of a script beside it, that does not exist."""
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        beside = path.parent / f"{node.module}.py"
        for name in (alias.name for alias in node.names):
            if node.module.split(".")[0] == "jaxscale":
                is_missing = not is_there(node.module, name)
            else:
                is_missing = beside.is_file() and name not in defined_in(beside)
            if is_missing:
                missing.append(f"{node.module}.{name}")
    return missing


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_what_a_script_imports_exists(path):
    assert missing_names(path) == []
