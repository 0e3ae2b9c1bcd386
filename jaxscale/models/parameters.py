"""The parameter table of a model: shape, logical dims and initial distribution of every leaf under its path.

A layer stack is one leaf [L, ...] per position of the repeating pattern, whatever the mesh.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.models.config import LayerKind, ModelConfig
from jaxscale.types import Params


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf.

    Args:
        dims: one letter a dimension (see `jaxscale.types`), such as "LDNH".
        shape: its size.
        std: standard deviation of the normal it starts from; 0 starts it at `mean`.
        mean: 0 or 1.
    """

    dims: str
    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0


def parameter_table(config: ModelConfig) -> dict[str, Any]:
    """Nested dict of Parameter, in the shape of the parameter tree."""
    build = _Builder(config)
    table: dict[str, Any] = {"embedding": {"tokens": build("VD", config.init_std)}}
    if config.positions == "learned":
        table["embedding"]["positions"] = build("PD", config.init_std)
    if config.prefix:
        table["prefix"] = {str(i): build.layer(kind, "") for i, kind in enumerate(config.prefix)}
    table["layers"] = {str(i): build.layer(kind, "L") for i, kind in enumerate(config.pattern)}
    table["final_norm"] = build.norm("")
    head = {} if config.is_tied else {"weights": build("VD", config.init_std)}
    if config.use_head_bias:
        head["bias"] = build("V")
    return table | ({"head": head} if head else {})


class _Builder:
    """Makes Parameters from dim letters, given the size of each letter."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.sizes = dict(
            L=config.num_periods,
            D=config.model_dim,
            N=config.num_heads,
            K=config.num_kv_heads,
            H=config.head_dim,
            F=config.ffn_dim,
            V=config.vocab_size,
            E=config.num_experts,
            P=config.max_length,
        )

    def __call__(self, dims: str, std: float = 0.0, mean: float = 0.0, **sizes: int) -> Parameter:
        sizes = self.sizes | sizes
        return Parameter(dims, tuple(sizes[d] for d in dims), std, mean)

    def norm(self, stack: str, dim: str = "D") -> dict[str, Parameter]:
        norm = {"scale": self(stack + dim, mean=1.0)}
        if self.config.norm == "layernorm" and self.config.use_bias:
            norm["bias"] = self(stack + dim)
        return norm

    def layer(self, kind: LayerKind, stack: str) -> dict[str, Any]:
        ffn = self.experts(stack) if kind.is_moe else self.ffn(stack)
        return {"attention": self.attention(stack), "moe" if kind.is_moe else "ffn": ffn}

    def attention(self, stack: str) -> dict[str, Any]:
        std = self.config.init_std
        out = {
            "norm": self.norm(stack),
            "q": self(stack + "DNH", std),
            "k": self(stack + "DKH", std),
            "v": self(stack + "DKH", std),
            "o": self(stack + "NHD", self.output_std()),
        }
        if self.config.use_bias:
            out |= {
                "q_bias": self(stack + "NH"),
                "k_bias": self(stack + "KH"),
                "v_bias": self(stack + "KH"),
            }
            out |= {"o_bias": self(stack + "D")}
        if self.config.use_qk_norm:
            out |= {"q_norm": self.norm(stack, "H"), "k_norm": self.norm(stack, "H")}
        return out

    def ffn(self, stack: str) -> dict[str, Any]:
        std = self.config.init_std
        out = {
            "norm": self.norm(stack),
            "up": self(stack + "DF", std),
            "down": self(stack + "FD", self.output_std()),
        }
        if self.config.is_gated:
            out["gate"] = self(stack + "DF", std)
        if self.config.use_bias:
            out |= {"up_bias": self(stack + "F"), "down_bias": self(stack + "D")}
            out |= {"gate_bias": self(stack + "F")} if self.config.is_gated else {}
        return out

    def experts(self, stack: str) -> dict[str, Any]:
        std, size = self.config.init_std, {"F": self.config.expert_dim}
        matrices = {
            "up": self(stack + "EDF", std, **size),
            "down": self(stack + "EFD", self.output_std(), **size),
        }
        if self.config.is_gated:
            matrices["gate"] = self(stack + "EDF", std, **size)
        out = {"norm": self.norm(stack), "router": self(stack + "DE", std), "experts": matrices}
        if self.config.router == "sparsemixer":
            out["omega"] = self(stack + "D", mean=1.0)  # of the output, arXiv 2310.00811
        return out

    def output_std(self) -> float:
        return self.config.init_std / math.sqrt(2 * self.config.num_layers)


def abstract_params(config: ModelConfig, dtype: str) -> Params:
    """The parameter tree as shapes, nothing allocated."""
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), parameter_table(config)
    )


def init_params(config: ModelConfig, key: jax.Array, dtype: str) -> Params:
    """Draws the initial parameters; each leaf's key comes from its path, so no draw depends on a mesh or an order.

    Args:
        config: the model.
        key: typed PRNG key.
        dtype: parameter type.
    Returns:
        Nested dict of arrays.
    """

    def draw(path: Any, parameter: Parameter) -> jax.Array:
        if not parameter.std:
            return jnp.full(parameter.shape, parameter.mean, dtype)
        leaf_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return (parameter.std * jax.random.normal(leaf_key, parameter.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, parameter_table(config))


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active): active leaves out the experts a token does not visit and the look-up tables.

    The embedding counts as active only where it is also the unembedding.
    """
    total = active = 0
    leaves = jax.tree_util.tree_leaves_with_path(parameter_table(config))
    for path, parameter in leaves:
        size = math.prod(parameter.shape)
        total += size
        if "E" in parameter.dims and parameter.dims[-1] != "E":
            active += size * config.num_active_experts // config.num_experts
        elif path[0].key != "embedding" or (path[1].key == "tokens" and config.is_tied):
            active += size
    return total, active
