"""Rotary position embedding and the scalings that stretch it to longer contexts."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, check_positive, check_types


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by one factor.

    Source: Chen et al. 2023, position interpolation (arXiv 2306.15595), equation 4.
    Args:
        factor: s, the new length over the original one.
    """

    factor: float

    def __post_init__(self):
        check_types(self)
        check_positive("LinearScaling.factor", self.factor)

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """Radians a position of each pair, in place of the `plain` ones of `theta`; [pairs]."""
        return plain / self.factor

    @property
    def magnitude(self) -> float:
        """Factor on queries and keys."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths divided by a factor, short ones kept, those in between interpolated.

    Source: Llama 3.1 as released (arXiv 2407.21783; its reference code's `apply_scaling`).
    Args:
        factor: by which the frequencies of long wavelengths are divided.
        low_frequency_factor: wavelengths above original_length / this are long.
        high_frequency_factor: wavelengths below original_length / this are short.
        original_length: tokens that the model was trained with before.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            check_positive(f"Llama3Scaling.{field.name}", getattr(self, field.name))
        if self.high_frequency_factor <= self.low_frequency_factor:
            expected = f"above low_frequency_factor = {self.low_frequency_factor}"
            name = "Llama3Scaling.high_frequency_factor"
            raise InputError(name, self.high_frequency_factor, expected)

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """Radians a position of each pair, in place of the `plain` ones of `theta`; [pairs]."""
        rotations = self.original_length * plain / (2 * math.pi)
        width = self.high_frequency_factor - self.low_frequency_factor
        share = np.clip((rotations - self.low_frequency_factor) / width, 0, 1)
        return (1 - share) * plain / self.factor + share * plain

    @property
    def magnitude(self) -> float:
        """Factor on queries and keys."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Frequencies interpolated by their number of rotations over the original length.

    Source: Peng et al. 2023, YaRN (arXiv 2309.00071), definition 2 and equations 20 to 22.
    Args:
        factor: s, the new length over the original one.
        original_length: tokens that the model was trained with before.
        beta_fast: pairs that rotate more often over the original length are kept.
        beta_slow: pairs that rotate less often are divided by the factor.
        attention_factor: factor on queries and keys; None for 0.1 ln(s) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("factor", "original_length", "beta_fast", "beta_slow"):
            check_positive(f"YarnScaling.{name}", getattr(self, name))
        if self.attention_factor is not None:
            check_positive("YarnScaling.attention_factor", self.attention_factor)
        if self.beta_fast <= self.beta_slow:
            expected = f"above beta_slow = {self.beta_slow}"
            raise InputError("YarnScaling.beta_fast", self.beta_fast, expected)

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """Radians a position of each pair, in place of the `plain` ones of `theta`; [pairs]."""
        half = len(plain)
        low = math.floor(self._pair(self.beta_fast, half, theta))
        high = math.ceil(self._pair(self.beta_slow, half, theta))
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = max(high - low, 0.001)
        interpolated = np.clip((np.arange(half) - low) / width, 0, 1)
        return interpolated * plain / self.factor + (1 - interpolated) * plain

    def _pair(
        self,
        num_rotations: float,
        half: int,
        theta: float,
    ) -> float:
        """The pair that rotates so often over the original length; a fraction between pairs."""
        wavelength = self.original_length / (num_rotations * 2 * math.pi)
        return half * math.log(wavelength) / math.log(theta)

    @property
    def magnitude(self) -> float:
        """Factor on queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """Each frequency divided by a factor of its own, found by a search.

    A released model has two lists of factors, one for documents up to the original length and one
    for longer ones. Without the second, all documents use the first.

    Source: Ding et al. 2024, LongRoPE (arXiv 2402.13753), equation 1.
    Args:
        factors: one for each pair of the rotated dims.
        magnitude: factor on queries and keys.
        long_factors: of documents longer than `original_length`; () for none.
        long_magnitude: of those documents.
        original_length: L0, tokens that the model was trained with before; given with
            `long_factors`.
    """

    factors: tuple[float, ...]
    magnitude: float = 1.0
    long_factors: tuple[float, ...] = ()
    long_magnitude: float = 1.0
    original_length: int | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("factors", "long_factors"):
            for factor in getattr(self, name):
                check_positive(f"LongRopeScaling.{name}", factor)
        for name in ("magnitude", "long_magnitude"):
            check_positive(f"LongRopeScaling.{name}", getattr(self, name))
        if bool(self.long_factors) != (self.original_length is not None):
            expected = "tokens where there are long_factors, None where there are none"
            raise InputError("LongRopeScaling.original_length", self.original_length, expected)
        if self.long_factors and len(self.long_factors) != len(self.factors):
            given = f"{len(self.long_factors)} factors"
            expected = f"{len(self.factors)}, as many as `factors`"
            raise InputError("LongRopeScaling.long_factors", given, expected)

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """Radians a position of each pair, in place of the `plain` ones of `theta`; [pairs]."""
        return plain / np.array(self.factors)

    @property
    def of_long(self) -> "LongRopeScaling":
        """The scaling of documents longer than `original_length`."""
        return LongRopeScaling(self.long_factors, self.long_magnitude)


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions of queries and keys.

    Args:
        theta: base of the frequencies, above 1.
        fraction: share of the head dim that is rotated, its first elements; the rest has no
            position (partial rotary, as in GPT-NeoX and Phi-2).
        scaling: how the frequencies are stretched for a longer context; None for not at all.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None

    def __post_init__(self):
        check_types(self)
        if not self.theta > 1:
            expected = "above 1, so that each pair rotates more slowly than the one before it"
            raise InputError("RotaryConfig.theta", self.theta, expected)
        if not 0 < self.fraction <= 1:
            raise InputError("RotaryConfig.fraction", self.fraction, "0 < fraction <= 1")

    @property
    def switch_length(self) -> int | None:
        """Longest document that has the first of two lists of factors; None with one list."""
        return getattr(self.scaling, "original_length", None) if self._has_two_lists else None

    @property
    def _has_two_lists(self) -> bool:
        return isinstance(self.scaling, LongRopeScaling) and bool(self.scaling.long_factors)

    def num_rotated(self, head_dim: int) -> int:
        """How many elements of a head are rotated."""
        return int(head_dim * self.fraction)

    def check_head_dim(self, head_dim: int) -> None:
        """Raises InputError unless the rotated elements of a head make pairs."""
        num = self.num_rotated(head_dim)
        if num % 2 or num == 0:
            expected = "an even number for rotary positions"
            if self.fraction < 1:
                expected += f" of its int(head_dim * fraction) = {num} first elements"
            raise InputError("AttentionConfig.head_dim", head_dim, expected)
        if isinstance(self.scaling, LongRopeScaling) and len(self.scaling.factors) != num // 2:
            given = f"{len(self.scaling.factors)} factors"
            raise InputError("LongRopeScaling.factors", given, f"{num // 2}, one for each pair")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position of each pair, [num_rotated / 2] float64.

        On the host in float64: at position 100,000 the device's power is off by hundredths of a
        radian.
        """
        half = self.num_rotated(head_dim) // 2
        plain = self.theta ** (-np.arange(half) / half)
        return plain if self.scaling is None else self.scaling.frequencies(plain, self.theta)


def rotate(
    x: Array,
    positions: Array,
    config: RotaryConfig,
    lengths: Array | None = None,
) -> Array:
    """Rotates pairs (i, i + R/2) of the first R elements of each head by position * frequency.

    Source: Su et al. 2021 (arXiv 2104.09864), equation 34, in the half-split layout of Llama.
    Args:
        x: [B, T, N, H].
        positions: [B, T] integers.
        config: frequencies, and R as a share of H.
        lengths: [B, T] tokens of each token's document; only where LongRoPE has two lists.
    Returns:
        [B, T, N, H] in the type of `x`; angles are taken in at least float32.
    """
    head_dim = x.shape[-1]
    num_rotated = config.num_rotated(head_dim)
    dtype = accumulator(x).dtype
    turn = _turn(config, head_dim, dtype, lengths)
    if num_rotated == head_dim:
        return _rotate_whole(x, positions, turn)
    rotated = _rotate_whole(x[..., :num_rotated], positions, turn)
    return jnp.concatenate([rotated, x[..., num_rotated:]], -1)


def document_lengths(
    positions: Array,
    segments: Array | None,
    whole_rows: Callable[[Array], Array],
) -> Array:
    """How many tokens the document of each token has, by the largest position in it.

    Args:
        positions: [B, T] int32 within the document.
        segments: [B, T] int32 document number, at most as many as tokens of a whole row; None where
            a row is one document.
        whole_rows: [B, T] -> the tokens of the same rows on all devices, in any order.
    Returns:
        [B, T] int32.
    """
    ends = whole_rows(positions) + 1
    if segments is None:
        return jnp.broadcast_to(ends.max(1, keepdims=True), positions.shape)
    rows = jnp.arange(ends.shape[0])[:, None]
    longest = jnp.zeros((ends.shape[0], ends.shape[1] + 1), ends.dtype)
    longest = longest.at[rows, whole_rows(segments)].max(ends)
    return longest[rows, segments]


class _Turn(NamedTuple):
    """What a position does to pairs.

    Args:
        frequencies: radians a position, [pairs], or [B, T, 1, 1, pairs] where documents differ.
        magnitude: factor on the result, likewise.
    """

    frequencies: Array | np.ndarray
    magnitude: Array | float


def _turn(
    config: RotaryConfig,
    head_dim: int,
    dtype: np.dtype,
    lengths: Array | None,
) -> _Turn:
    magnitude = 1.0 if config.scaling is None else config.scaling.magnitude
    turn = _Turn(config.frequencies(head_dim).astype(dtype), magnitude)
    if config.switch_length is None:
        return turn
    scaling = config.scaling.of_long
    long = _turn(dataclasses.replace(config, scaling=scaling), head_dim, dtype, None)
    is_long = (lengths > config.switch_length)[..., None, None, None]
    return _Turn(*(jnp.where(is_long, *both) for both in zip(long, turn, strict=True)))


def _rotate_whole(
    x: Array,
    positions: Array,
    turn: _Turn,
) -> Array:
    half = x.shape[-1] // 2
    pairs = accumulator(x).reshape(*x.shape[:-1], 2, half)
    angles = positions[..., None, None, None].astype(pairs.dtype) * turn.frequencies
    magnitude = turn.magnitude
    is_scaled = not (isinstance(magnitude, float) and magnitude == 1)

    def scaled(x: Array) -> Array:
        return x * jnp.asarray(magnitude, x.dtype) if is_scaled else x

    along = pairs * scaled(jnp.cos(angles))
    # Reversing swaps the halves. Slicing them and joining them again would make XLA pad two halves
    # and add them up in the gradient.
    swapped = lax.rev(pairs, (pairs.ndim - 2,))
    signs = np.array([[-1], [1]], pairs.dtype)
    across = swapped * (signs * scaled(jnp.sin(angles)))
    return (along + across).reshape(x.shape).astype(x.dtype)
