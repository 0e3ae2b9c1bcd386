"""Low-rank adapters: made beside a trained model, used beside its matrices, merged for export."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import tree
from jaxscale.models.config import LoraConfig, ModelConfig
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.linear import Adapted, Selected
from jaxscale.types import Array, Params

ADAPTER = "_lora"
TRAINABLE = rf".*{ADAPTER}/[ab]"  # paths of adapters, for `TrainConfig.trainable`


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of a model.

    Args:
        lora: their configuration.
        leaves: values by the paths of a tree that has them.
    """

    lora: LoraConfig
    leaves: dict[str, Any]


def adapted(params: Params, lora: LoraConfig | None) -> Params:
    """A layer's tree in which each matrix with an adapter is an `Adapted`, as forwards use it.

    Args:
        params: the tree of one layer.
        lora: of the model; None returns the tree.
    """

    def one(matrix: Array, adapter: Params) -> Adapted:
        return Adapted(matrix, adapter["a"], adapter["b"], lora.scale)

    return params if lora is None else _joined(params, one)


def selected(params: Params, factors: Array) -> Params:
    """A layer's tree whose matrices have several adapters side by side, see `side_by_side`.

    Args:
        params: the tree of one layer.
        factors: [B, T, sum of R] of each token: those of `factor_table` that its adapter has.
    """

    def one(matrix: Array, adapter: Params) -> Selected:
        return Selected(matrix, adapter["a"], adapter["b"], factors)

    return _joined(params, one)


def side_by_side(
    params: Params,
    adapters: Sequence[Adapters],
    dtype: str,
) -> Params:
    """The parameters of a model without adapters, with several of which each token has one.

    Source: Chen et al. 2023, Punica (arXiv 2310.18547), section 2, adapters of a batch at once; as
        one product of all ranks together, of which a token's own are not multiplied by 0.
    Args:
        params: of the model.
        adapters: of the same model; ranks and targets may differ.
        dtype: in which they are used.
    """
    paths = dict.fromkeys(path for each in adapters for path in each.leaves)
    found = params
    for path in paths:
        leaf = _factors_of_all(path, adapters, dtype)
        found = _inserted(found, path.split(tree.SEPARATOR), leaf)
    return found


def _factors_of_all(path: str, adapters: Sequence[Adapters], dtype: str) -> Array:
    """The factors of a matrix of all adapters, joined by rank; 0 where an adapter has none."""
    like = next(each.leaves[path] for each in adapters if path in each.leaves)
    is_stacked = path.startswith("layers")
    axis = like.ndim - 1 if path.endswith("/a") else int(is_stacked)
    parts = []
    for each in adapters:
        shape = (*like.shape[:axis], each.lora.rank, *like.shape[axis + 1 :])
        leaf = each.leaves.get(path)
        parts.append(jnp.zeros(shape, dtype) if leaf is None else jnp.asarray(leaf, dtype))
    return jnp.concatenate(parts, axis)


def _inserted(params: Params, path: Sequence[str], leaf: Array) -> Params:
    """The tree with a leaf more."""
    name, *rest = path
    part = _inserted(params.get(name, {}), rest, leaf) if rest else leaf
    return params | {name: part}


def factor_table(adapters: Sequence[Adapters]) -> np.ndarray:
    """[1 + adapters, sum of R] float32: alpha / r in an adapter's own columns, else 0.

    The first row is of tokens without an adapter.
    """
    ranks = [each.lora.rank for each in adapters]
    table = np.zeros((1 + len(adapters), sum(ranks)), np.float32)
    ends = np.cumsum(ranks)
    for row, (each, end) in enumerate(zip(adapters, ends, strict=True), 1):
        table[row, end - each.lora.rank : end] = each.lora.scale
    return table


def merged(params: Params, lora: LoraConfig | None) -> Params:
    """A tree in which each matrix W with an adapter is W + (alpha / r) a b, and none has one.

    Args:
        params: the tree of a model or of a part, of one layer or stacked.
        lora: of the model; None returns the tree.
    """

    def one(matrix: Array, adapter: Params) -> Array:
        return matrix + lora.scale * _product(adapter["a"], adapter["b"], matrix)

    return params if lora is None else _joined(params, one)


def _joined(params: Params, one: Callable[[Array, Params], Any]) -> Params:
    """The tree with one(matrix, adapter) for each matrix that has an adapter beside it."""
    found = {}
    for name, part in params.items():
        if name.endswith(ADAPTER):
            continue
        if adapter := params.get(f"{name}{ADAPTER}"):
            found[name] = one(part, adapter)
        else:
            found[name] = _joined(part, one) if isinstance(part, dict) else part
    return found


def _product(a: Array, b: Array, matrix: Array) -> Array:
    """a b in the shape and type of the matrix; its inputs are in `a`, its outputs in `b`."""
    # A stack of layers adds a leading dim to both.
    is_stacked = a.ndim + b.ndim - 2 > matrix.ndim

    def one(a: Array, b: Array) -> Array:
        return jnp.tensordot(a, b, 1)

    product = jax.vmap(one)(a, b) if is_stacked else one(a, b)
    return product.astype(matrix.dtype)


def new_adapters(
    config: ModelConfig,
    key: Array,
    dtype: str,
) -> dict[str, Array]:
    """New adapters of a model, which change nothing yet, by path; `key` is a typed PRNG key."""
    table = tree.flatten(parameter_table(config))
    adapters = {path: parameter for path, parameter in table.items() if f"{ADAPTER}/" in path}
    return init_params(adapters, key, dtype)


def with_adapters(
    params: Params,
    config: ModelConfig,
    adapters: dict[str, Any],
) -> Params:
    """The parameters of a model without adapters, with these.

    Args:
        params: of `without_adapters(config)`.
        config: the model with adapters.
        adapters: by path, as `new_adapters` returns them.
    """

    def filled(table: Any, params: Any, path: str) -> Any:
        if not isinstance(table, dict):
            return adapters.get(path, params)
        return {
            name: filled(part, params.get(name, {}), f"{path}/{name}" if path else name)
            for name, part in table.items()
        }

    return filled(parameter_table(config), params, "")


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The model into which `merged` makes a tree."""
    return dataclasses.replace(config, lora=None)


def base(params: Params) -> Params:
    """The parameters of the model beneath its adapters."""
    return _joined(params, lambda matrix, adapter: matrix)
