"""What the device is that a program is traced for."""

import jax


def compute_capability() -> str | None:
    """Of this process's GPUs, such as "9.0" for an H100 or H200; None without one."""
    return jax.local_devices()[0].compute_capability if jax.default_backend() == "gpu" else None


def device_kind() -> str:
    """Of this process's devices, such as "NVIDIA H200"."""
    return jax.local_devices()[0].device_kind
