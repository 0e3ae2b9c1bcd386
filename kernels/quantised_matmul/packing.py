"""How integers of 4 and 8 bits lie in words, in the order in which the tensor cores take them.

A unit is 64 outputs by 128 inputs. Each of a warpgroup's 128 threads takes 8 words of it, two times
4 neighbouring ones, and a word has what a thread multiplies in one wgmma of 16 inputs. Integers of
8 bits are two units of 4: 16 times the upper one, which has the sign, plus the lower one.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

OUTPUTS, INPUTS = 64, 128
WORDS = OUTPUTS * INPUTS // 8
OFFSETS = {4: (8,), 8: (8, 0)}  # what is added to the integers of each unit, upper ones first
# Into what a unit [outputs, inputs] is divided: first the outputs, then the inputs.
PARTS = {
    "warp": 4,
    "half of rows": 2,
    "row": 8,
    "four words": 2,
    "word": 4,
    "half of inputs": 2,
    "thread of a row": 4,
    "neighbour": 2,
}
# The words, and behind them what is in a word, from its upper bits to its lower ones.
STORED = (
    "four words",
    "warp",
    "row",
    "thread of a row",
    "word",
    "neighbour",
    "half of inputs",
    "half of rows",
)


def pack(values: Array, bits: int) -> Array:
    """Integers [K, N] as words.

    Args:
        values: from -8 to 7 or from -128 to 127; K is a multiple of INPUTS and N of OUTPUTS.
        bits: 4 or 8.
    Returns:
        [N / OUTPUTS, K / INPUTS, bits / 4, WORDS] int32.
    """
    values = values.astype(jnp.int32)
    planes = (values,)
    if bits == 8:
        planes = values >> 4, values & 15
    units = []
    for plane, offset in zip(planes, OFFSETS[bits], strict=True):
        units.append(_pack_plane(plane + offset))
    return jnp.stack(units, 2)


def unpack(words: Array) -> Array:
    """The integers [K, N] int32 of words, as `pack` took them."""
    tiles, chunks, num_planes, _ = words.shape
    offsets = OFFSETS[4 * num_planes]
    units = unpack_unit(words)
    integers = units[:, :, 0] - offsets[0]
    if num_planes == 2:
        integers = 16 * integers + units[:, :, 1]
    by_input = integers.transpose(1, 3, 0, 2)
    return by_input.reshape(chunks * INPUTS, tiles * OUTPUTS)


def look_up(words: Array, outputs: Array) -> Array:
    """The integers of some outputs, of which nothing else is read.

    Args:
        words: as of `pack`.
        outputs: [M] numbers of outputs.
    Returns:
        [M, K] int32.
    """
    _, chunks, num_planes, _ = words.shape
    places_of_unit = jnp.asarray(_in_order(np.arange(WORDS * 8)))
    places = places_of_unit[outputs % OUTPUTS]  # [M, INPUTS]
    tiles = (outputs // OUTPUTS)[:, None, None]
    total = 0
    for plane, offset in enumerate(OFFSETS[4 * num_planes]):
        found = words[tiles, np.arange(chunks)[:, None], plane, (places // 8)[:, None]]
        integers = found >> 4 * (places % 8)[:, None] & 15
        total = 16 * total + integers - offset
    return total.reshape(len(outputs), chunks * INPUTS)


def unpack_unit(words: Array) -> Array:
    """Words [..., WORDS] to their unsigned integers [..., OUTPUTS, INPUTS] int32."""
    lead = words.shape[:-1]
    integers = (words[..., None] >> 4 * jnp.arange(8)) & 15
    return _in_order(integers.reshape(*lead, WORDS * 8))


def _in_order(stored: Array) -> Array:
    """What is as stored [..., WORDS * 8] as [..., OUTPUTS, INPUTS]."""
    lead = stored.shape[:-1]
    parts = stored.reshape(*lead, *(PARTS[name] for name in STORED))
    places = [STORED.index(name) for name in PARTS]
    parts = parts.transpose(*range(len(lead)), *(len(lead) + i for i in places))
    return parts.reshape(*lead, OUTPUTS, INPUTS)


def _pack_plane(unsigned: Array) -> Array:
    """[K, N] of 0 to 15 to words [N / OUTPUTS, K / INPUTS, WORDS]."""
    chunks = unsigned.shape[0] // INPUTS
    tiles = unsigned.shape[1] // OUTPUTS
    units = unsigned.reshape(chunks, INPUTS, tiles, OUTPUTS)
    units = units.transpose(2, 0, 3, 1)
    parts = units.reshape(tiles, chunks, *PARTS.values())
    names = list(PARTS)
    parts = parts.transpose(0, 1, *(2 + names.index(name) for name in STORED))
    in_words = parts.reshape(tiles, chunks, WORDS, 8)
    # The fields do not overlap, and the sum may wrap around into the sign.
    return (in_words << 4 * jnp.arange(8)).sum(-1, dtype=jnp.int32)
