"""Set before anything asks for devices: the CPU backend, split into eight virtual ones, compiling quickly."""

import gc
import os

# The programs here are tiny, and nearly all of the time is compiling: without LLVM's optimisations
# and with XLA's older emitters, which lower a kernel in one step, the tests need less than half of
# it.
FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_cpu_parallel_codegen_split_count": "1",
    "--xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters",
}

os.environ.setdefault("JAX_PLATFORMS", "cpu")
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join(
    [*given, *(f"{flag}={value}" for flag, value in FLAGS.items() if flag not in str(given))]
)

import jax  # noqa: E402

# An interpreted kernel computes in callbacks, which could wait for ever for threads that the main
# one has taken.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Of the modules just loaded nothing is ever freed, and tracing makes many short-lived objects: 5 %
# of the time.
gc.collect()
gc.freeze()
gc.set_threshold(100_000, 50, 100)

LONGEST = "train", "parallel"  # folders


def pytest_collection_modifyitems(items):
    """Their tests come first, so that two workers end together."""
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)
