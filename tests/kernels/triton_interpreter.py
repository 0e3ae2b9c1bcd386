"""Runs Triton kernels on the host, in Triton's own interpreter, on NumPy arrays."""

import functools
import os
import threading

import ml_dtypes
import numpy as np

# Read when Triton is imported: its functions are interpreted then, not compiled.
os.environ["TRITON_INTERPRET"] = "1"

MARGIN = 1 << 20  # bytes behind an array
NAN = 0xFF  # any number of these bytes is NaN as a floating-point number
# The interpreter keeps the number of its program in one place, and devices compute side by side.
_one_at_a_time = threading.Lock()


def interpret(kernel, out_type, zeroed, grid, constants, *operands):
    """The kernel's results, as `kernels.triton_call.call` gives them."""
    _mend_interpreter()
    results = [_with_margin(np.zeros(each.shape, each.dtype)) for each in out_type]
    # What a kernel does not write must not pass for a zero.
    for number, result in enumerate(results):
        if number not in zeroed:
            result.view(np.uint8)[...] = 0x7F
    arrays = [_with_margin(np.asarray(operand)) for operand in operands]
    # A GPU does not warn of infinities that a kernel provides for.
    with _one_at_a_time, np.errstate(over="ignore"):
        kernel[grid](*map(HostTensor, [*arrays, *results]), **constants)
    for each in [*arrays, *results]:
        assert (each.base[-MARGIN:] == NAN).all(), "the kernel wrote past the end of an array"
    return tuple(results)


def _with_margin(array):
    """A copy with NaN behind its end, where a kernel must not read."""
    size = array.nbytes
    memory = np.full(size + MARGIN, NAN, np.uint8)
    copy = memory[:size].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@functools.cache
def _mend_interpreter():
    """Mends what Triton 3.6 gets wrong on the host.

    It makes an int of an array, which NumPy 2.5 refuses. It keeps bfloat16 as unsigned integers,
    whose bits it multiplies, and cuts float32 off where the GPU rounds.
    """
    from triton import language
    from triton.runtime import interpreter

    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    create_dot, convert_float = builder.create_dot, interpreter._convert_float

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def wide(operand):
        if operand.dtype.scalar != language.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), language.float32)

    def dot(self, a, b, *others):
        return create_dot(self, wide(a), wide(b), *others)

    def convert(data, source, target, rounding):
        if (source, target) == (language.float32, language.bfloat16):
            return data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return convert_float(data, source, target, rounding)

    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = convert
    builder.create_dot = dot


class HostTensor:
    """An array that the interpreter takes for a tensor in the host's memory, in place."""

    def __init__(self, array):
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def new_empty(self, size, device):
        return HostTensor(np.empty(size, self.dtype))

    def set_(self, storage, *layout):
        self.array = storage.array

    def cpu(self):
        return self

    def copy_(self, other):
        """Nothing to do: what was written is in the array."""

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides
