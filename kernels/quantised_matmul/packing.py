"""How integers of 4 and 8 bits lie in words, in the order in which the tensor cores take them.

A unit is 64 outputs by 128 inputs. Each of a warpgroup's 128 threads takes 8 words of it, two times
4 neighbouring ones, and a word has what a thread multiplies in one wgmma of 16 inputs. Integers of
8 bits are two units of 4: 16 times the upper one, which has the sign, plus the lower one.
"""

import jax.numpy as jnp
from jax import Array

OUTPUTS, INPUTS = 64, 128
WORDS = OUTPUTS * INPUTS // 8
# How a unit [outputs, inputs] is divided into (warp, half of its rows, row) and
# (word of four, word, half, thread of a row, neighbour).
_UNIT = (4, 2, 8, 2, 4, 2, 4, 2)
# The same parts as words lie: word of four, warp, row, thread of a row, word; then within a word
# the neighbour, in the upper or lower 16 bits, the half of the inputs and that of the rows.
_ORDER = (3, 0, 2, 6, 4, 7, 5, 1)
OFFSETS = {4: (8,), 8: (8, 0)}  # what is added to the integers of each unit, upper ones first


def pack(values: Array, bits: int) -> Array:
    """Integers [K, N] as words.

    Args:
        values: from -8 to 7 or from -128 to 127; K is a multiple of INPUTS and N of OUTPUTS.
        bits: 4 or 8.
    Returns:
        [N / OUTPUTS, K / INPUTS, bits / 4, WORDS] int32.
    """
    values = values.astype(jnp.int32)
    planes = (values,) if bits == 4 else (values >> 4, values & 15)
    units = [_pack_plane(plane + offset) for plane, offset in zip(planes, OFFSETS[bits])]
    return jnp.stack(units, 2)


def unpack(words: Array) -> Array:
    """The integers [K, N] int32 of words, as `pack` took them."""
    tiles, chunks, num_planes, _ = words.shape
    bits = 4 * num_planes
    planes = [unpack_unit(words[:, :, i]) - OFFSETS[bits][i] for i in range(num_planes)]
    units = planes[0] if bits == 4 else 16 * planes[0] + planes[1]
    return units.transpose(1, 3, 0, 2).reshape(chunks * INPUTS, tiles * OUTPUTS)


def unpack_unit(words: Array) -> Array:
    """Words [..., WORDS] to their unsigned integers [..., OUTPUTS, INPUTS] int32."""
    shifts = jnp.arange(2)[:, None, None] * 16 + jnp.arange(2)[:, None] * 8 + jnp.arange(2) * 4
    parts = words.reshape(*words.shape[:-1], *(_UNIT[i] for i in _ORDER[:5]), 1, 1, 1)
    parts = (parts >> shifts) & 15
    first = words.ndim - 1
    places = [first + _ORDER.index(i) for i in range(8)]
    return parts.transpose(*range(first), *places).reshape(*words.shape[:-1], OUTPUTS, INPUTS)


def _pack_plane(unsigned: Array) -> Array:
    """[K, N] of 0 to 15 to words [N / OUTPUTS, K / INPUTS, WORDS]."""
    chunks, tiles = unsigned.shape[0] // INPUTS, unsigned.shape[1] // OUTPUTS
    units = unsigned.reshape(chunks, INPUTS, tiles, OUTPUTS).transpose(2, 0, 3, 1)
    parts = units.reshape(tiles, chunks, *_UNIT).transpose(0, 1, *(2 + i for i in _ORDER))
    parts = parts.reshape(tiles, chunks, WORDS, 8)
    shifts = jnp.asarray([0, 4, 8, 12, 16, 20, 24, 28])
    # The fields do not overlap, and the sum may wrap around into the sign.
    return (parts << shifts).sum(-1, dtype=jnp.int32)
