"""The CPU split into eight virtual devices that compile quickly, set before JAX looks for any."""

import gc
import os
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

import jax  # noqa: E402

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
