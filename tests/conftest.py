"""Set before anything asks for devices: the CPU backend, split into eight virtual ones, compiling quickly."""

import os

# The programs here are tiny: without LLVM's optimisations the tests need a third less time, nearly all of it compiling.
FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}

os.environ.setdefault("JAX_PLATFORMS", "cpu")
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join(
    [*given, *(f"{flag}={value}" for flag, value in FLAGS.items() if flag not in str(given))]
)

import jax  # noqa: E402

# An interpreted kernel computes in callbacks, which could wait for ever for threads that the main one has taken.
jax.config.update("jax_cpu_enable_async_dispatch", False)
