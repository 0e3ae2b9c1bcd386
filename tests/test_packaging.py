"""Installing: the kernels are `jaxscale.kernels` in every way, and we shadow no other package."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
# Without dependencies and without the network.
ALONE = ["--no-deps", "--no-index", "--no-build-isolation"]
PRINT_KERNELS = "import jaxscale.kernels; print(jaxscale.kernels.__file__)"
PACKAGED = ("setup.cfg", "pyproject.toml", "LICENSE", "README.md")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what packaging reads, so that builds leave nothing behind in the repository."""
    copy = tmp_path_factory.mktemp("checkout") / "jaxscale"
    copy.mkdir()
    for name in PACKAGED:
        shutil.copy(ROOT / name, copy)
    skipped = shutil.ignore_patterns("__pycache__")
    for name in ("jaxscale", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skipped)
    shutil.copytree(ROOT / "experiments/configs", copy / "experiments/configs")
    return copy


@pytest.fixture(scope="module")
def wheel_site(checkout, tmp_path_factory) -> Path:
    """A folder into which a wheel of the checkout is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", *ALONE, "--wheel-dir", folder, checkout], cwd=folder)
    (wheel,) = folder.glob("*.whl")
    install(folder / "site", wheel, cwd=folder)
    return folder / "site"


def run(command: list, *, cwd: Path, **environment) -> str:
    """The command's standard output; fails with all of its output."""
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", **environment}
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def install(target: Path, *what: str | Path, cwd: Path) -> None:
    """Installs into an empty folder."""
    run([*PIP, "install", *ALONE, "--target", target, *what], cwd=cwd)


def modules_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_bare_checkout(checkout):
    printed = run([sys.executable, "-c", PRINT_KERNELS], cwd=checkout)
    assert Path(printed).is_relative_to(checkout)


def test_wheel(checkout, wheel_site, tmp_path):
    command = [sys.executable, "-c", PRINT_KERNELS]
    printed = run(command, cwd=tmp_path, PYTHONPATH=str(wheel_site))
    package = wheel_site / "jaxscale"
    assert Path(printed) == package / "kernels" / "__init__.py"
    kernels = {f"kernels/{module}" for module in modules_under(checkout / "kernels")}
    assert modules_under(package) == modules_under(checkout / "jaxscale") | kernels
    installed = {path.name for path in wheel_site.iterdir() if path.suffix != ".dist-info"}
    assert installed == {"jaxscale", "bin"}


def test_the_gin_files_come_with_the_wheel(checkout, wheel_site, tmp_path):
    """A command names them wherever the package is, and they include one another."""
    here, there = (
        {path.relative_to(folder) for path in folder.rglob("*.gin")}
        for folder in (checkout / "experiments/configs", wheel_site / "jaxscale/configs")
    )
    assert there == here and Path("runs/main_job.gin") in here
    command = [sys.executable, "-m", "jaxscale", "inspect", "jaxscale/configs/runs/main_job.gin"]
    printed = run(command, cwd=tmp_path, PYTHONPATH=str(wheel_site))
    assert "ExpertsConfig.num_experts = 4" in printed


def test_the_console_script_is_declared(wheel_site):
    (entry_points,) = wheel_site.glob("*.dist-info/entry_points.txt")
    assert "jaxscale = jaxscale.__main__:main" in entry_points.read_text()


def test_editable_install(checkout, tmp_path):
    target = tmp_path / "site"
    install(target, "--editable", checkout, cwd=tmp_path)
    # -S: the environment of this test may itself hold an editable jaxscale, which must not be the
    # one found.
    python = [sys.executable, "-S", "-c"]
    follow_pth = f"import site; site.addsitedir({str(target)!r}); "
    paths = f"{target}:{sysconfig.get_path('purelib')}"
    printed = run([*python, follow_pth + PRINT_KERNELS], cwd=tmp_path, PYTHONPATH=paths)
    assert Path(printed).is_relative_to(checkout)
    shadow = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    assert run([*python, follow_pth + shadow], cwd=tmp_path, PYTHONPATH=paths) == "None"


def test_transformers_imports_from_the_repository_root():
    """transformers looks for a public package `kernels`, for which it must not take ours."""
    names = "PreTrainedConfig, AutoTokenizer, LlamaConfig"
    program = (
        f"import transformers; from transformers import {names}; print(LlamaConfig().model_type)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    assert run(command, cwd=ROOT, HF_HUB_OFFLINE="1") == "llama"
