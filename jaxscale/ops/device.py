"""What the device is that a program is traced for, and whose kernels compute on it."""

import logging
from types import ModuleType
from typing import Any

import jax

from jaxscale.kernels import device as described
from jaxscale.kernels.triton_call import missing
from jaxscale.ops.tuned import check_tuned
from jaxscale.types import InputError

HOPPER = "9.0"
AMPERE = 8.0  # before it tensor cores do not multiply bfloat16, and cuDNN has no fused attention
# Our kernels by the language that they are written in; "xla" stands for none of them.
FAMILIES = ("mosaic", "triton", "xla")

logger = logging.getLogger(__name__)
_named: str | None = None


def is_hopper() -> bool:
    """Whether the kernels for Hopper GPUs run here."""
    return described.compute_capability() == HOPPER


def name_kernels(family: str | None) -> None:
    """Has this process take the kernels of one of FAMILIES alone; None chooses by the device."""
    global _named
    _named = family


def named_kernels() -> str | None:
    """The family that was named."""
    return _named


def kernel_family() -> str:
    """The family whose kernels are taken: the one that was named, or else the device's fastest.

    Raises:
        InputError: the device cannot run the one that was named, or block sizes of another device
            are in use.
    """
    check_tuned()
    if _named is None:
        chosen = next(family for family in FAMILIES if device_refusal(family) is None)
        if chosen == "xla" and described.compute_capability():
            logger.info("kernels: xla alone; those in Triton need %s", device_refusal("triton"))
        return chosen
    if reason := device_refusal(_named):
        raise InputError("RuntimeConfig.kernels", _named, reason)
    return _named


def device_refusal(family: str) -> str | None:
    """What a backend would need of the device, as the text of an error; None if nothing.

    Args:
        family: one of FAMILIES, or any backend's name.
    """
    capability = described.compute_capability()
    here = f"a GPU of compute capability {capability}" if capability else jax.default_backend()
    if family == "splash" and here != "tpu":
        return f"a TPU, but this is {here}"
    if family == "mosaic" and capability != HOPPER:
        return f"a Hopper GPU, of compute capability {HOPPER}, but this is {here}"
    is_old = capability is None or float(capability) < AMPERE
    if family in ("cudnn", "triton") and is_old:
        return f"a GPU of compute capability {AMPERE} or newer, but this is {here}"
    return missing() if family == "triton" else None


def is_taken(operation: str, family: str, refusal: str | None) -> bool:
    """Whether a family's kernel takes a request: it does if it has no reason to refuse it.

    If the family was named, the log gives the reason.
    """
    if refusal is not None and family == _named:
        logger.info("%s: not by %s, which needs %s", operation, family, refusal)
    return refusal is None


def kernel_for(api: ModuleType, *operands: Any) -> str | None:
    """The family whose kernel computes the request here; None where it is left to XLA.

    Args:
        api: of an operation's folder in `kernels`.
        operands: what its `refusal` looks at.
    """
    family = kernel_family()
    if family not in api.BACKENDS or family == "xla":
        return None
    operation = api.__name__.split(".")[-2]
    return family if is_taken(operation, family, api.refusal(family, *operands)) else None
