"""Quantised weights of Hugging Face's world, read as the matrices that they stand for.

AWQ, GPTQ and compressed-tensors keep integers of 4 or 8 bits in words of 32, with a scale and a
zero for each group of inputs and output. Nothing of what their packages execute is needed.

Source: Lin et al. 2023, AWQ (arXiv 2306.00978); Frantar et al. 2022, GPTQ (arXiv 2210.17323); the
    formats as AutoAWQ ("gemm"), GPTQModel ("gptq", "gptq_v2") and compressed-tensors
    ("pack-quantized") write them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxscale.checkpoint.source import LazyArray
from jaxscale.convert.fields import Fields
from jaxscale.ops.quantised import GROUP, Integers
from jaxscale.types import InputError, check_positive

FIELD = "quantization_config"
WORD_BITS = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight outputs, those of a word's bits from 0 on
# How compressed-tensors ordered a matrix's inputs, and whether it stores the group of each.
ACTIVATION_ORDERS = {
    False: False,
    "weight": False,
    "static": False,
    True: True,
    "group": True,
    "dynamic": True,
}
Arrays = dict[str, LazyArray]
Values = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A quantised matrix as a `LazyArray` of its values [out, in].

    Args:
        arrays: its tensors, by the last part of their names.
        shape: of the matrix.
        read: the tensors' values -> the matrix in float32.
        integers: the tensors' values -> integers [out, in] and scales [out, groups], where they are
            as `ops.quantised` has them; None for other forms.
    """

    arrays: Arrays
    shape: tuple[int, int]
    read: Callable[[Values], np.ndarray]
    integers: Callable[[Values], Integers] | None = None

    @property
    def dtype(self) -> np.dtype:
        """That of the scales."""
        name = "scales" if "scales" in self.arrays else "weight_scale"
        return self.arrays[name].dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads one box."""
        return self.read(self.values())[index].astype(self.dtype)

    def values(self) -> Values:
        """The tensors, read."""
        return {name: array[()] for name, array in self.arrays.items()}

    @property
    def bits(self) -> int:
        """Of an integer of compressed-tensors."""
        return _bits_of(self.arrays)


@dataclasses.dataclass(frozen=True)
class _Format:
    """A format with its settings.

    Args:
        packed: last part of the name of the tensor of words.
        others: last parts of the names of the other tensors; those that end with "?" may be absent.
        shape: the tensors -> [out, in], and the shapes that the other tensors have beside it.
        read: as of `PackedMatrix`.
        integers: as of `PackedMatrix`, of matrices whose groups are consecutive inputs.
    """

    packed: str
    others: tuple[str, ...]
    shape: Callable[[Arrays], tuple[tuple[int, int], Shapes]]
    read: Callable[[Values], np.ndarray]
    integers: Callable[[Values], Integers] | None = None


def whole_leaves(
    leaves: Mapping[str, LazyArray],
    given: Any,
    where: str,
) -> dict[str, LazyArray]:
    """The tensors of a source, in which quantised matrices are whole.

    Args:
        leaves: the source's tensors by name.
        given: `quantization_config` of config.json.
        where: the file, for messages.
    Raises:
        InputError: the method or a setting of it is not known, or a tensor is missing.
    """
    place = f"{where}: {FIELD}"
    if not isinstance(given, dict):
        raise InputError(place, given, "a JSON object")
    method = given.get("quant_method")
    if method not in FORMATS:
        raise InputError(f"{place}: quant_method", method, f"one of {', '.join(FORMATS)}")
    form = FORMATS[method](Fields(given, place))
    whole = dict(leaves)
    for name in leaves:
        module, _, last = name.rpartition(".")
        if last == form.packed:
            whole[f"{module}.weight"] = _matrix(form, module, whole)
    return whole


def _matrix(form: _Format, module: str, leaves: dict[str, LazyArray]) -> PackedMatrix:
    """Takes a module's tensors out of the leaves."""
    arrays = {}
    for name in (form.packed, *form.others):
        last = name.removesuffix("?")
        array = leaves.pop(f"{module}.{last}", None)
        if array is not None:
            arrays[last] = array
        elif not name.endswith("?"):
            raise InputError(f"{module}.{last}", None, f"a tensor beside {module}.{form.packed}")
    shape, others = form.shape(arrays)
    for last, wanted in others.items():
        if last in arrays and tuple(arrays[last].shape) != wanted:
            expected = f"{wanted}, as {form.packed} and {FIELD} say"
            raise InputError(f"{module}.{last}", tuple(arrays[last].shape), expected)
    integers = None if "weight_g_idx" in arrays else form.integers
    return PackedMatrix(arrays, shape, form.read, integers)


def _unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Words [rows, columns] to unsigned integers, of which a word has several along an axis."""
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32)
    words = words.view(np.uint32)
    words = np.moveaxis(words, axis, -1)
    integers = words[..., None] >> shifts
    integers &= np.uint32(2**bits - 1)
    flat = integers.reshape(len(words), -1)
    return np.moveaxis(flat.astype(np.int32), -1, axis)


def _gptq(fields: Fields) -> _Format:
    bits = _bits(fields)
    version = fields.take("checkpoint_format", str, "gptq")
    # The first version stores each zero less one.
    more = {"gptq": 1, "gptq_v2": 0}.get(version)
    if more is None:
        raise InputError(fields.place("checkpoint_format"), version, "gptq or gptq_v2")

    group_size = _group_size(fields)

    def shape(arrays: Arrays) -> tuple[tuple[int, int], Shapes]:
        rows, outputs = arrays["qweight"].shape
        inputs = rows * WORD_BITS // bits
        groups = _num_groups(inputs, group_size)
        zeros = groups, outputs * bits // WORD_BITS
        return (outputs, inputs), {"scales": (groups, outputs), "qzeros": zeros, "g_idx": (inputs,)}

    def read(values: Values) -> np.ndarray:
        integers = _unpacked(values["qweight"], bits, 0)
        zeros = _unpacked(values["qzeros"], bits, 1) + more
        scales = values["scales"].astype(np.float32)
        groups = _checked_groups("g_idx", values["g_idx"], len(scales))
        return ((integers - zeros[groups]) * scales[groups]).T

    return _Format("qweight", ("qzeros", "scales", "g_idx"), shape, read)


def _awq(fields: Fields) -> _Format:
    bits, num = 4, WORD_BITS // 4
    fields.expect("bits", bits)
    fields.expect("version", "gemm", "GEMM")
    group_size = _group_size(fields)

    def in_order(integers: np.ndarray) -> np.ndarray:
        by_word = integers.reshape(len(integers), -1, num)
        places = np.argsort(AWQ_ORDER)
        return by_word[:, :, places].reshape(integers.shape)

    def shape(arrays: Arrays) -> tuple[tuple[int, int], Shapes]:
        inputs, columns = arrays["qweight"].shape
        groups, outputs = _num_groups(inputs, group_size), columns * num
        return (outputs, inputs), {"scales": (groups, outputs), "qzeros": (groups, columns)}

    def read(values: Values) -> np.ndarray:
        integers = in_order(_unpacked(values["qweight"], bits, 1))
        zeros = in_order(_unpacked(values["qzeros"], bits, 1))
        scales = values["scales"].astype(np.float32)
        groups = _consecutive(len(integers), group_size)
        return ((integers - zeros[groups]) * scales[groups]).T

    return _Format("qweight", ("qzeros", "scales"), shape, read)


def _compressed(fields: Fields) -> _Format:
    fields.expect("format", "pack-quantized")
    for name in ("transform_config", "sparsity_config"):
        fields.expect(name, {})  # products around the matrices, or other matrices
    groups = fields.take("config_groups", dict)
    settings = {
        _read_group(group, f"{fields.place('config_groups')}: {name}")
        for name, group in groups.items()
    }
    if len(settings) != 1:
        expected = "groups of modules with one strategy, group_size and actorder"
        raise InputError(fields.place("config_groups"), list(groups), expected)
    ((group_size, is_ordered),) = settings

    def shape(arrays: Arrays) -> tuple[tuple[int, int], Shapes]:
        _bits_of(arrays)
        rows, columns = (int(size) for size in arrays["weight_shape"][()])
        scales = rows, _num_groups(columns, group_size)
        return (rows, columns), {"weight_scale": scales, "weight_g_idx": (columns,)}

    def integers(values: Values) -> Integers:
        rows, columns = values["weight_shape"]
        bits = _bits_of(values)
        unsigned = _unpacked(values["weight_packed"], bits, 1)[:rows, :columns]
        return Integers((unsigned - 2 ** (bits - 1)).astype(np.int8), values["weight_scale"])

    def read(values: Values) -> np.ndarray:
        found = integers(values)
        by_input = values.get("weight_g_idx")
        if by_input is None or (by_input == -1).all():  # as the file begins; no order was found
            by_input = _consecutive(found.values.shape[1], group_size)
        groups = _checked_groups("weight_g_idx", by_input, found.scales.shape[1])
        return found.values * found.scales.astype(np.float32)[:, groups]

    others = ("weight_scale", "weight_shape", "weight_g_idx" if is_ordered else "weight_g_idx?")
    as_ours = integers if group_size == GROUP else None
    return _Format("weight_packed", others, shape, read, as_ours)


def _group_size(fields: Fields) -> int | None:
    """Inputs that share a scale; None where all inputs do."""
    size = fields.take("group_size", int)
    if size == -1:
        return None
    check_positive(fields.place("group_size"), size)
    return size


def _num_groups(num_inputs: int, group_size: int | None) -> int:
    return math.ceil(num_inputs / (group_size or num_inputs))


def _consecutive(num_inputs: int, group_size: int | None) -> np.ndarray:
    """The group of each input, of groups of consecutive ones."""
    return np.arange(num_inputs) // (group_size or num_inputs)


def _checked_groups(name: str, by_input: np.ndarray, num_groups: int) -> np.ndarray:
    """The group of each input; raises InputError for one that there is not."""
    if by_input.min() < 0 or by_input.max() >= num_groups:
        given = int(by_input.min()), int(by_input.max())
        raise InputError(name, given, f"groups from 0 to {num_groups - 1}")
    return by_input


def _read_group(group: Any, place: str) -> tuple[int | None, bool]:
    """(inputs that share a scale, whether each input's group is stored) of a group of modules.

    None where all inputs share one.
    """
    fields = Fields(group, place)
    for activations in ("input_activations", "output_activations"):
        fields.expect(activations)  # in integers they change the model
    weights = Fields(fields.take("weights", dict), fields.place("weights"))
    weights.expect("type", "int")
    weights.expect("symmetric", True)
    _bits(weights, "num_bits")
    order = weights.take("actorder", str | bool, False)
    is_ordered = ACTIVATION_ORDERS.get(order)
    if is_ordered is None:
        expected = f"one of {', '.join(map(repr, ACTIVATION_ORDERS))}"
        raise InputError(weights.place("actorder"), order, expected)
    if weights.choose("strategy", {"group": "group", "channel": "channel"}) == "channel":
        return None, is_ordered
    return _group_size(weights), is_ordered


def _bits_of(arrays: Mapping[str, Any]) -> int:
    """Bits of an integer, by the number of words that a row takes."""
    shape = tuple(arrays["weight_packed"].shape)
    rows, columns = (int(size) for size in arrays["weight_shape"][()])
    for bits in (4, 8):
        if shape == (rows, math.ceil(columns * bits / WORD_BITS)):
            return bits
    expected = f"{rows} rows of words for {columns} integers of 4 or 8 bits"
    raise InputError("weight_packed", shape, expected)


def packed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers [out, in] as the words of compressed-tensors."""
    num = WORD_BITS // bits
    unsigned = np.pad(
        integers.astype(np.int32) + 2 ** (bits - 1), ((0, 0), (0, -integers.shape[1] % num))
    )
    by_word = unsigned.astype(np.uint32).reshape(len(integers), -1, num)
    shifted = by_word << np.arange(0, WORD_BITS, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(shifted, -1).view(np.int32)


def _bits(fields: Fields, name: str = "bits") -> int:
    bits = fields.take(name, int)
    if bits not in (4, 8):
        raise InputError(fields.place(name), bits, "4 or 8")
    return bits


FORMATS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}
