"""Every notebook runs from its first cell to its last.

And what is stored of it is what a reader should see.

To store a notebook anew after a change: python tests/test_notebooks.py notebooks/00_tour.ipynb
"""

import configparser
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 240  # for one cell; a whole notebook takes about a minute on two idle cores


def execute(path: Path):
    """Runs a notebook from a checkout.

    Its progress bars reduced to their last state and no times recorded.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
    )
    # A reader's process has as many devices as the machine, not those of the tests.
    readers = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    client.execute(env=readers | {"PYTHONPATH": str(ROOT)})
    return notebook


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shown = [output for cell in execute(path).cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown), (
        "a notebook shows a picture"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_stored_notebook_was_run_in_order_and_without_errors(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not [cell.id for cell in notebook.cells if "execution" in cell.metadata], (
        "no execution times are stored"
    )


@pytest.mark.parametrize(
    ("machine", "extras"), [("gpu", "[cuda,gpu-kernels]"), ("tpu", "[tpu]"), ("cpu", "")]
)
def test_the_tour_installs_what_the_hosting_machine_takes(machine, extras, monkeypatch):
    """The cell's own text, where jaxscale is missing; what it asks of pip is noted."""
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / "00_tour.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.id == "install"]
    asked = []
    source = re.sub("%pip (.*)", r'asked.append(f"\1")', cell.source)
    devices = {"tpu": "accel*"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: name if machine == "gpu" else None)
    monkeypatch.setattr(Path, "glob", lambda _, name: iter([name] * (name == devices.get(machine))))
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(compile(source, "install", "exec"), {"asked": asked})
    assert asked == [f"install --quiet --editable ..{extras}"]
    known = configparser.ConfigParser()
    known.read(ROOT / "setup.cfg")
    assert set(re.findall("[a-z-]+", extras)) <= known["options.extras_require"].keys()


if __name__ == "__main__":
    import nbformat

    for argument in sys.argv[1:]:
        nbformat.write(execute(Path(argument)), argument)
