"""`tune`: block sizes of the Triton kernels for the GPU at hand."""

from jaxscale.ops import tuned
from jaxscale.ops.device import device_refusal
from jaxscale.types import InputError


def tune(*, output: str) -> None:
    """Measures block sizes of every Triton kernel on this GPU and writes the fastest to a file.

    It takes some minutes. The file is written after each kernel, and given again after a run that
    was cut, only what it lacks is measured. A run takes it by `runtime.block_sizes`.

    Args:
        output: the new file, or one that was begun.
    Raises:
        InputError: this device cannot run Triton kernels, the file cannot be written, or it is of
            another device.
        RunError: no block sizes of a kernel run here.
    """
    if reason := device_refusal("triton"):
        raise InputError("tune", "this device", reason)
    tuned.tune(output)
    print(f"to use it: --set runtime.block_sizes={output!r}")
