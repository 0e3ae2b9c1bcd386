"""The CPU split into eight virtual devices that compile quickly, set before JAX looks for any."""

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The programs here are tiny, and nearly all of the time is compiling. Without LLVM's optimisations,
# and with XLA's older emitters, which lower a kernel in one step, the tests need less than half.
FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_cpu_parallel_codegen_split_count": "1",
    "--xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters",
}

os.environ.setdefault("JAX_PLATFORMS", "cpu")
given = os.environ.get("XLA_FLAGS", "").split()
ours = [f"{flag}={value}" for flag, value in FLAGS.items() if flag not in str(given)]
os.environ["XLA_FLAGS"] = " ".join([*given, *ours])

# Compiled programs are kept on disk, also the smallest, and shared by the workers, by the
# processes that tests start, and by later runs. JAX_ENABLE_COMPILATION_CACHE=false goes without.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Operations are lowered without the lines that called them: no test reads these, and without them
# the tests take a twentieth less.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.room_clock import Budgets, RoomClock, room_of  # noqa: E402

# An interpreted kernel computes in callbacks, which could wait for ever for threads that the main
# one has taken.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# The modules just loaded live until the end, and tracing makes many short-lived objects: without
# this the garbage collector takes 5 % of the time.
gc.collect()
gc.freeze()
gc.set_threshold(100_000, 50, 100)


def pytest_configure(config):
    config.pluginmanager.register(RoomClock(config))


def pytest_collection_modifyitems(items):
    """The rooms that take longest come first, so that two workers end together."""
    seconds = Budgets.read().rooms
    items.sort(key=lambda item: -seconds.get(room_of(item.nodeid), 0))


@pytest.fixture
def mount_disk(tmp_path):
    """Mounts a file system of a size such as "64k"; skips the test where nobody may."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def import_text(tmp_path, monkeypatch):
    """Imports a module of this source; it is gone after the test."""
    imported = []

    def load(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        imported.append(name)
        return importlib.import_module(name)

    yield load
    for name in imported:
        del sys.modules[name]
