"""The states that megatron-core's optimizer has of one rank's weights, which it numbers.

Source: `megatron.core.optimizer`. A rank's weights are in groups: those that decay and those that
do not, of experts that expert ranks share out, and of embeddings with a learning rate of their own.
The weights of a group are in the model's order, one group is numbered after the other, and each
number has a state.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxscale.checkpoint.file_array import FileArray
from jaxscale.checkpoint.torch_file import Tensor
from jaxscale.types import InputError

MASTERS = "fp32_from_fp16_params"
HALF = 2  # bytes of a type that has a master
EXPERTS = ".experts."
BUFFER = ".expert_bias"  # no optimizer has it
EMBEDDINGS = ("embedding.", "output_layer.")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of one rank.

    Args:
        key: what it is called among the rank's weights.
        name: in its chunk of the model.
        tensor: its values.
    """

    key: Any
    name: str
    tensor: Tensor

    def is_in(
        self,
        group: Mapping[str, Any],
        *,
        has_experts_apart: bool,
        has_own_rates: bool,
    ) -> bool:
        """Whether it is in a group of the optimizer.

        Args:
            group: of the optimizer.
            has_experts_apart: experts are in other groups than the rest.
            has_own_rates: so are embeddings.
        """
        if self.name.endswith(BUFFER):
            return False
        is_decayed = len(self.tensor.shape) > 1 and not self.name.endswith(".bias")
        is_expert = has_experts_apart and EXPERTS in self.name
        has_own_rate = has_own_rates and self.name.startswith(EMBEDDINGS)
        return (is_decayed, is_expert, has_own_rate) == (
            group["wd_mult"] > 0,
            bool(group.get("is_expert_parallel")),
            bool(group.get("is_decoupled_lr")),
        )


def lacks_states(optimizer: Any) -> bool:
    """Whether an optimizer has weights but no states of them, as they are in another file."""
    parts = optimizer if isinstance(optimizer, list) else [optimizer or {}]
    inner = [_inner(part) for part in parts if part]
    return any(part.get("param_groups") and not part.get("state") for part in inner)


def states_of(
    optimizer: Any,
    weights: Sequence[Weight],
    where: str,
) -> Iterator[tuple[Any, str | None, Tensor]]:
    """(key of a weight, name of its state, values); a float32 master has no name of a state.

    Args:
        optimizer: what a rank's file holds under that name; nothing comes of one without states,
            which is the distributed optimizer's.
        weights: of the rank, in the model's order.
        where: the file, for messages.
    Raises:
        InputError: the states are not those of the weights.
    """
    parts = optimizer if isinstance(optimizer, list) else [optimizer or {}]
    groups = [group for part in parts for group in _inner(part).get("param_groups", ())]
    kinds = dict(
        has_experts_apart=any(group.get("is_expert_parallel") for group in groups),
        has_own_rates=any(group.get("is_decoupled_lr") for group in groups),
    )
    for part in parts:
        inner, masters = _inner(part), part.get(MASTERS)
        if not inner.get("state"):
            continue
        for number, group in enumerate(inner["param_groups"]):
            own = [weight for weight in weights if weight.is_in(group, **kinds)]
            states = [inner["state"].get(index) for index in group["params"]]
            _check(own, states, where)
            for weight, state in zip(own, states):
                for name, values in state.items():
                    if isinstance(values, FileArray) and values.shape == weight.tensor.shape:
                        yield weight.key, name, values
            if masters is not None:
                halves = [weight for weight in own if weight.tensor.dtype.itemsize == HALF]
                for weight, master in zip(halves, masters[number], strict=True):
                    yield weight.key, None, master


def _inner(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """The optimizer that a wrapper for 16-bit weights holds, or the part itself."""
    return part.get("optimizer", part)


def _check(own: list[Weight], states: list[Any], where: str) -> None:
    """Raises InputError unless a group's states are those of its weights, by number and shapes."""
    shapes = [weight.tensor.shape for weight in own]
    found = []
    for state in states:
        arrays = [value for value in (state or {}).values() if isinstance(value, FileArray)]
        found.append(max((array.shape for array in arrays), key=len, default=None))
    if found != shapes:
        expected = f"states of {[weight.name for weight in own]} in this order: shapes {shapes}"
        raise InputError(f"{where}: optimizer", found, expected)
