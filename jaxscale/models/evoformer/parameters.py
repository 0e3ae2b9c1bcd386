"""Widths of an Evoformer block and the table of its parameters.

It is made of the same `Parameter`s as a decoder's, so `init_params`, `abstract_params` and
`count_parameters` of `jaxscale.models.parameters` take it, and roles tell optimizers what decays.
"""

import dataclasses
import math

from jaxscale.models.parameters import Parameter, Table
from jaxscale.types import Role, check_positive, check_types


@dataclasses.dataclass(frozen=True)
class EvoformerConfig:
    """The widths of a block; the defaults are those of AlphaFold 2.

    Args:
        msa_dim: c_m, width of the alignment.
        pair_dim: c_z, width of the pairs.
        num_msa_heads: heads of attention in the alignment.
        num_pair_heads: heads of attention in the pairs.
        head_dim: width of a head.
        outer_dim: width of the two factors of the outer product mean.
        multiplication_dim: width within the triangle multiplications.
        transition_factor: the transitions' hidden width over that of their input.
    """

    msa_dim: int = 256
    pair_dim: int = 128
    num_msa_heads: int = 8
    num_pair_heads: int = 4
    head_dim: int = 32
    outer_dim: int = 32
    multiplication_dim: int = 128
    transition_factor: int = 4

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            check_positive(f"EvoformerConfig.{field.name}", getattr(self, field.name))


def evoformer_table(config: EvoformerConfig) -> Table:
    """Nested dict of Parameter, in the order in which a block uses its parts.

    Source: Jumper et al. 2021, supplement, section 1.11.4: gates and what is added to a residual
        have matrices of 0, and gates biases of 1.
    """
    msa, pair = config.msa_dim, config.pair_dim
    pair_attention = _attention(pair, config.num_pair_heads, config.head_dim)
    pair_attention["pair_bias"] = _matrix("DN", pair, config.num_pair_heads)
    msa_attention = _attention(msa, config.num_msa_heads, config.head_dim)
    row_bias = {
        "pair_norm": _norm(pair),
        "pair_bias": _matrix("DN", pair, config.num_msa_heads),
    }
    multiplication = _multiplication(pair, config.multiplication_dim)
    return {
        "msa_row_attention": msa_attention | row_bias,
        "msa_column_attention": msa_attention,
        "msa_transition": _transition(msa, config.transition_factor * msa),
        "outer_product_mean": _outer_product_mean(msa, config.outer_dim, pair),
        "triangle_multiplication_outgoing": multiplication,
        "triangle_multiplication_incoming": multiplication,
        "triangle_attention_starting": pair_attention,
        "triangle_attention_ending": pair_attention,
        "pair_transition": _transition(pair, config.transition_factor * pair),
    }


def _matrix(dims: str, *shape: int, gain: float = 1.0) -> Parameter:
    """Of variance gain / inputs, of which its first dim is all."""
    std = math.sqrt(gain / shape[0])
    return Parameter(dims, shape, Role.MATRIX, std)


def _zero_matrix(dims: str, *shape: int) -> Parameter:
    return Parameter(dims, shape, Role.MATRIX)


def _bias(dims: str, *shape: int, mean: float = 0.0) -> Parameter:
    return Parameter(dims, shape, Role.BIAS, mean=mean)


def _norm(width: int, dims: str = "D") -> Table:
    return {
        "scale": Parameter(dims, (width,), Role.NORM, mean=1.0),
        "bias": Parameter(dims, (width,), Role.NORM),
    }


def _attention(width: int, heads: int, head_dim: int) -> Table:
    shape = (width, heads, head_dim)
    # Glorot's variance, 2 / (inputs + outputs).
    glorot = 2 * width / (width + heads * head_dim)
    return {
        "norm": _norm(width),
        "q": _matrix("DNH", *shape, gain=glorot),
        "k": _matrix("DNH", *shape, gain=glorot),
        "v": _matrix("DNH", *shape, gain=glorot),
        "gate": _zero_matrix("DNH", *shape),
        "gate_bias": _bias("NH", heads, head_dim, mean=1.0),
        "o": _zero_matrix("NHD", heads, head_dim, width),
        "o_bias": _bias("D", width),
    }


def _transition(width: int, hidden: int) -> Table:
    return {
        "norm": _norm(width),
        "up": _matrix("DF", width, hidden, gain=2.0),
        "up_bias": _bias("F", hidden),
        "down": _zero_matrix("FD", hidden, width),
        "down_bias": _bias("D", width),
    }


def _outer_product_mean(msa: int, width: int, pair: int) -> Table:
    return {
        "norm": _norm(msa),
        "left": _matrix("DF", msa, width),
        "left_bias": _bias("F", width),
        "right": _matrix("DF", msa, width),
        "right_bias": _bias("F", width),
        "o": _zero_matrix("FFD", width, width, pair),
        "o_bias": _bias("D", pair),
    }


def _multiplication(pair: int, width: int) -> Table:
    table = {"norm": _norm(pair)}
    for side in ("left", "right"):
        table[side] = _matrix("DF", pair, width)
        table[f"{side}_bias"] = _bias("F", width)
        table[f"{side}_gate"] = _zero_matrix("DF", pair, width)
        table[f"{side}_gate_bias"] = _bias("F", width, mean=1.0)
    return table | {
        "product_norm": _norm(width, "F"),
        "o": _zero_matrix("FD", width, pair),
        "o_bias": _bias("D", pair),
        "gate": _zero_matrix("DD", pair, pair),
        "gate_bias": _bias("D", pair, mean=1.0),
    }
