"""Installing: the kernels are `jaxscale.kernels` however jaxscale was installed, and nothing of ours shadows others."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
PRINT_KERNELS = "import jaxscale.kernels; print(jaxscale.kernels.__file__)"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what packaging reads, so that builds leave nothing behind in the repository."""
    copy = tmp_path_factory.mktemp("checkout") / "jaxscale"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("jaxscale", "kernels"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    return copy


def run(command: list, *, cwd: Path, **environment) -> str:
    """The command's standard output; fails with all of its output."""
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def install(target: Path, *what: str | Path, cwd: Path) -> None:
    """Installs into an empty folder, without dependencies and without the network."""
    run(
        [
            *PIP,
            "install",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--target",
            target,
            *what,
        ],
        cwd=cwd,
    )


def modules_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_bare_checkout(checkout):
    assert Path(run([sys.executable, "-c", PRINT_KERNELS], cwd=checkout)).is_relative_to(checkout)


def test_wheel(checkout, tmp_path):
    run(
        [
            *PIP,
            "wheel",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "-w",
            tmp_path,
            checkout,
        ],
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    install(target, wheel, cwd=tmp_path)
    printed = run([sys.executable, "-c", PRINT_KERNELS], cwd=tmp_path, PYTHONPATH=str(target))
    assert Path(printed) == target / "jaxscale" / "kernels" / "__init__.py"
    assert modules_under(target / "jaxscale") == modules_under(checkout / "jaxscale") | {
        f"kernels/{module}" for module in modules_under(checkout / "kernels")
    }
    assert {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")} == {
        "jaxscale",
        "bin",
    }


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
    """transformers looks for a public package named kernels; ours, in the working folder, must not be taken for it."""
    program = "import transformers; from transformers import PreTrainedConfig, AutoTokenizer, LlamaConfig; LlamaConfig()"
    run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, HF_HUB_OFFLINE="1")


def test_the_console_script_is_declared(checkout, tmp_path):
    install(tmp_path / "site", checkout, cwd=tmp_path)
    (entry_points,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "jaxscale = jaxscale.cli:main" in entry_points.read_text()
