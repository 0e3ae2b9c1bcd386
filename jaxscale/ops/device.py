"""The device that a program is traced for."""

import jax

HOPPER = "9.0"


def compute_capability() -> str | None:
    """That of the GPUs that this process computes on, such as "9.0" for an H100 or H200.

    None without a GPU.
    """
    if jax.default_backend() != "gpu":
        return None
    return jax.local_devices()[0].compute_capability


def is_hopper() -> bool:
    """Whether the kernels for Hopper GPUs run here."""
    return compute_capability() == HOPPER
