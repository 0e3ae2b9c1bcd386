"""Attention: one call with its mask structure, and one module for each backend behind it."""

from jaxscale.ops.attention.api import (
    BACKENDS,
    DETERMINISTIC,
    KERNEL_OUTPUT,
    attention,
    check_backend,
)
from jaxscale.ops.attention.context import BLOCK, AttentionContext, BlockLayout

__all__ = [
    "BACKENDS",
    "BLOCK",
    "DETERMINISTIC",
    "KERNEL_OUTPUT",
    "AttentionContext",
    "BlockLayout",
    "attention",
    "check_backend",
]
