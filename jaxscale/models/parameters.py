"""The parameter table of a model: shape, dims, role and first value of every leaf under its path.

A layer stack is one leaf [L, ...] for each position of the repeating pattern, whatever the mesh.
Every level of a table is in the order in which a forward uses its parts.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import tree
from jaxscale.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
)
from jaxscale.types import Params, Role

Table = dict[str, Any]

# What muP calls hidden weights: their inputs grow with the width.
HIDDEN = (Role.MATRIX, Role.EXPERT, Role.ROUTER)
SMALL_ROLES = (Role.NORM, Role.BIAS, Role.ROUTER, Role.LOGIT_BIAS, Role.VALUE)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf.

    Args:
        dims: one letter a dimension (see `jaxscale.types`), such as "LDNH".
        shape: its size.
        role: what it is.
        std: standard deviation of the normal it starts from; 0 starts it at `mean`.
        mean: of the first values.
        learning_rate_factor: by which the optimizer's learning rate is multiplied.
        active: share of its elements that one token multiplies with: less than 1 for experts, 0 for
            a look-up.
        model: which model of a run it is of, where a run trains several.
    """

    dims: str
    shape: tuple[int, ...]
    role: Role
    std: float = 0.0
    mean: float = 0.0
    learning_rate_factor: float = 1.0
    active: float = 1.0
    model: str = ""

    @property
    def is_stacked(self) -> bool:
        """Whether it holds one row for each period of the layer stack."""
        return self.dims.startswith("L")


def parameter_table(config: ModelConfig) -> Table:
    """Nested dict of Parameter, in the shape of the parameter tree."""
    build = _Builder(config)
    table: Table = {"embedding": build.embedding()}
    if config.prefix:
        table["prefix"] = build.layers(config.prefix, stack="")
    table["layers"] = build.layers(config.pattern, stack="L")
    table["final_norm"] = build.final_norm()
    if config.use_value_head:
        table["value_head"] = build.value_head()
    elif head := build.head():
        table["head"] = head
    if pooler := build.pooler():
        table["pooler"] = pooler
    return table


class _Builder:
    """Makes Parameters from dim letters; the size of a letter is the model's or the layer's."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.sizes = {
            "L": config.num_periods,
            "D": config.model_dim,
            "V": config.vocab_size,
            "U": config.max_length,
        }

    def __call__(
        self,
        dims: str,
        role: Role,
        std: float = 0.0,
        mean: float = 0.0,
        active: float = 1.0,
        **sizes: int,
    ) -> Parameter:
        sizes = self.sizes | sizes
        shape = tuple(sizes[letter] for letter in dims)
        width = self.config.width_multiplier if role in HIDDEN else 1.0
        return Parameter(
            dims,
            shape,
            role,
            std=std / math.sqrt(width),
            mean=mean,
            learning_rate_factor=1 / width,
            active=active,
        )

    def embedding(self) -> Table:
        config, std = self.config, self.config.init_std
        # An embedding that is also the unembedding is multiplied with.
        active = 1.0 if config.is_tied else 0.0
        out: Table = {"tokens": self("VD", Role.EMBEDDING, std, active=active)}
        if config.use_learned_positions:
            out["positions"] = self("UD", Role.POSITIONS, std, active=0.0)
        if num := config.num_token_types:
            out["types"] = self("UD", Role.POSITIONS, std, active=0.0, U=num)
        if config.use_embedding_norm:
            out["norm"] = self.norm("")
        return out

    def final_norm(self) -> Table:
        if self.config.head_activation is None:
            return self.norm("")
        # Of its two sizes, which are equal, only the first is the residual's.
        width = self.config.model_dim
        return {
            "dense": self("DH", Role.MATRIX, self.config.init_std, H=width),
            "dense_bias": self("H", Role.BIAS, H=width),
            **self.norm(""),
        }

    def head(self) -> Table:
        out = {}
        if not self.config.is_tied:
            out["weights"] = self("VD", Role.UNEMBEDDING, self.config.init_std)
        if self.config.use_head_bias:
            out["bias"] = self("V", Role.LOGIT_BIAS)
        return out

    def value_head(self) -> Table:
        """Begins with zeros, so that at first all answers are worth the same on any trunk."""
        return {"weights": self("YD", Role.VALUE, Y=1)}

    def pooler(self) -> Table:
        """Of a whole text, so that none of it counts as active for a token."""
        sizes = {"H": self.config.model_dim, "Y": 2}
        matrix = functools.partial(
            self, role=Role.MATRIX, std=self.config.init_std, active=0.0, **sizes
        )
        out = {}
        if self.config.use_pooler:
            out["dense"] = matrix("DH")
            out["dense_bias"] = self("H", Role.BIAS, **sizes)
        if self.config.use_pair_head:
            out["pair"] = matrix("HY")
            out["pair_bias"] = self("Y", Role.BIAS, **sizes)
        return out

    def norm(self, stack: str, dims: str = "D", **sizes: int) -> Table:
        mean = 1.0 - self.config.norm.scale_offset
        norm = {"scale": self(stack + dims, Role.NORM, mean=mean, **sizes)}
        if self.config.norm.use_bias:
            norm["bias"] = self(stack + dims, Role.NORM, **sizes)
        return norm

    def layers(self, layers: Sequence[LayerConfig], stack: str) -> Table:
        return {str(number): self.layer(layer, stack) for number, layer in enumerate(layers)}

    def layer(self, layer: LayerConfig, stack: str) -> Table:
        attention = self.attention(layer.attention, stack)
        if layer.is_moe:
            name, feed_forward = "moe", self.experts(layer.feed_forward, stack)
        else:
            name, feed_forward = "ffn", self.feed_forward(layer.feed_forward, stack)
        if layer.has_norm_before:
            attention = {"norm": self.norm(stack)} | attention
        if layer.has_norm_before and not layer.is_parallel:
            feed_forward = {"norm": self.norm(stack)} | feed_forward
        if layer.has_norm_after or layer.has_norm_of_sum:
            attention["norm_after"] = self.norm(stack)
            feed_forward["norm_after"] = self.norm(stack)
        return {"attention": attention, name: feed_forward}

    def attention(self, config: AttentionConfig, stack: str) -> Table:
        sizes = {"N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim}
        std = self.config.init_std
        out = {}
        for name, outputs in (("q", "NH"), ("k", "KH"), ("v", "KH")):
            out[name] = self(stack + "D" + outputs, Role.MATRIX, std, **sizes)
            if name in config.biases:
                out[f"{name}_bias"] = self(stack + outputs, Role.BIAS, **sizes)
        if config.qk_norm is not None:
            q_dims, k_dims = ("H", "H") if config.qk_norm == "head" else ("NH", "KH")
            out["q_norm"] = self.norm(stack, q_dims, **sizes)
            out["k_norm"] = self.norm(stack, k_dims, **sizes)
        out["o"] = self(stack + "NHD", Role.MATRIX, self.output_std(), **sizes)
        if "o" in config.biases:
            out["o_bias"] = self(stack + "D", Role.BIAS)
        return self.with_adapters(out, stack, sizes)

    def feed_forward(self, config: FeedForwardConfig, stack: str) -> Table:
        sizes = {"F": config.dim}
        out = {}
        names = ("gate", "up") if config.is_gated else ("up",)
        for name in names:
            out[name] = self(stack + "DF", Role.MATRIX, self.config.init_std, **sizes)
            if config.use_bias:
                out[f"{name}_bias"] = self(stack + "F", Role.BIAS, **sizes)
        out["down"] = self(stack + "FD", Role.MATRIX, self.output_std(), **sizes)
        if config.use_bias:
            out["down_bias"] = self(stack + "D", Role.BIAS)
        return self.with_adapters(out, stack, sizes)

    def experts(self, config: ExpertsConfig, stack: str) -> Table:
        std = self.config.init_std
        sizes = {"E": config.num_experts, "F": config.dim}
        active = config.num_active / config.num_experts
        expert = functools.partial(self, role=Role.EXPERT, active=active, **sizes)
        names = ("gate", "up") if config.is_gated else ("up",)
        matrices = {name: expert(stack + "EDF", std=std) for name in names}
        matrices["down"] = expert(stack + "EFD", std=self.output_std())
        out = {"router": self(stack + "DE", Role.ROUTER, std, **sizes), "experts": matrices}
        if config.has_output_scale:
            out["omega"] = self(stack + "D", Role.NORM, mean=1.0)
        if config.shared_dim:
            out["shared"] = self.shared_expert(config.shared_dim, stack)
        return out

    def shared_expert(self, dim: int, stack: str) -> Table:
        std, sizes = self.config.init_std, {"F": dim, "R": 1}
        return {
            "gate": self(stack + "DF", Role.MATRIX, std, **sizes),
            "up": self(stack + "DF", Role.MATRIX, std, **sizes),
            "down": self(stack + "FD", Role.MATRIX, self.output_std(), **sizes),
            "weight": self(stack + "DR", Role.ROUTER, std, **sizes),
        }

    def with_adapters(
        self,
        matrices: Table,
        stack: str,
        sizes: dict[str, int],
    ) -> Table:
        """The matrices with the adapters beside them."""
        lora = self.config.lora
        if lora is None:
            return matrices
        sizes = sizes | {"R": lora.rank}
        adapters = {}
        for name in lora.targets:
            if name not in matrices:
                continue
            dims = matrices[name].dims.removeprefix(stack)
            # The inputs of "o" are the dims of the heads; every other matrix has one.
            num_inputs = len(dims) - 1 if name == "o" else 1
            inputs, outputs = dims[:num_inputs], dims[num_inputs:]
            adapters[f"{name}_lora"] = self.adapter(inputs, outputs, stack, sizes)
        return matrices | adapters

    def adapter(
        self,
        inputs: str,
        outputs: str,
        stack: str,
        sizes: dict[str, int],
    ) -> Table:
        """Two matrices whose product is 0 at first, because `b` is."""
        a = self(stack + inputs + "R", Role.MATRIX, **sizes)
        b = self(stack + "R" + outputs, Role.MATRIX, **sizes)
        fan_in = math.prod(a.shape[len(stack) : -1])
        # In place of the std that muP divides by the width, which the fan-in has in it already.
        return {"a": dataclasses.replace(a, std=fan_in**-0.5), "b": b}

    def output_std(self) -> float:
        return self.config.init_std / math.sqrt(2 * self.config.num_layers)


def in_order_of_use(table: Table, path: str = "") -> Iterator[tuple[str, Parameter]]:
    """The parameters by path in the order in which a forward uses them."""
    for name, entry in table.items():
        if isinstance(entry, Parameter):
            yield path + name, entry
        else:
            yield from in_order_of_use(entry, f"{path}{name}{tree.SEPARATOR}")


def stored_type(parameter: Parameter, dtype: str) -> jnp.dtype:
    """The type in which a parameter is stored where matrices are stored in `dtype`.

    Norms, biases, routers and value heads are kept in at least float32. They are few, and in
    bfloat16 the steps next to a scale of 1 are 2^-7, in which an update of 3e-4 is lost.
    """
    dtype = jnp.dtype(dtype)
    return jnp.promote_types(dtype, jnp.float32) if parameter.role in SMALL_ROLES else dtype


def abstract_params(table: Table, dtype: str) -> Params:
    """The parameter tree as shapes, nothing allocated; its matrices are of `dtype`."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, stored_type(p, dtype)), table)


def init_params(
    table: Table,
    key: jax.Array,
    dtype: str,
) -> Params:
    """Draws the first parameters; no draw depends on a mesh or an order.

    Args:
        table: of the model.
        key: typed PRNG key; each leaf's own key comes of it and of the leaf's path.
        dtype: type of the matrices, see `stored_type`.
    Returns:
        Nested dict of arrays.
    """

    def draw(path: Any, parameter: Parameter) -> jax.Array:
        stored = stored_type(parameter, dtype)
        if not parameter.std:
            return jnp.full(parameter.shape, parameter.mean, stored)
        number = zlib.crc32(jax.tree_util.keystr(path).encode())
        leaf_key = jax.random.fold_in(key, number)
        normal = jax.random.normal(leaf_key, parameter.shape)
        return (parameter.std * normal).astype(stored)

    return jax.tree_util.tree_map_with_path(draw, table)


def count_parameters(table: Table) -> tuple[int, int]:
    """(total, active): active leaves out look-up tables and the experts a token does not visit.

    The embedding counts as active only where it is also the unembedding.
    """
    entries = [entry for _, entry in in_order_of_use(table)]
    sizes = [math.prod(entry.shape) for entry in entries]
    active = [round(size * entry.active) for size, entry in zip(sizes, entries, strict=True)]
    return sum(sizes), sum(active)
