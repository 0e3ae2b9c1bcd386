"""What megatron-core's distributed optimizer has in its format "torch_dist": flat buckets.

Source: `megatron.core.optimizer.distrib_optimizer`, "dp_reshardable". Each group of data ranks, one
a tensor, pipeline and expert rank, has its weights in buckets, from the model's last to its first,
each from a multiple of 64 elements on. Nothing says which weight lies where: that follows from the
order of a model's weights, and each float32 master is compared with its weight. In the format
"fully_reshardable" states are named like weights, and nothing is to be done.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.checkpoint.boxes import Merged
from jaxscale.checkpoint.megatron_buffers import ALIGNMENT, NUM_COMPARED
from jaxscale.checkpoint.patterns import Cut, Offset, Rule
from jaxscale.checkpoint.source import contents_named
from jaxscale.checkpoint.torch_distributed import DistributedCheckpoint
from jaxscale.checkpoint.torch_file import load_torch
from jaxscale.checkpoint.universal import Shard, merge
from jaxscale.checkpoint.views import Divided, Rows
from jaxscale.types import InputError

BUCKET = re.compile(
    r"(?:chained_(?P<optimizer>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)"
    r"\.gbuf_idx_(?P<buffer>\d+)\.dtype_\(torch\.(?P<dtype>\w+), torch\.\w+\)"
    r"\.bucket_idx_(?P<bucket>\d+)\.(?P<state>\w+)"
)
COMMON, FORMAT = "common.pt", "metadata.json"
STATE, MASTER = "optimizer.state.", "param"
LAYERS, EXPERTS = "decoder.layers.", "mlp.experts.experts."
DEGREES = {
    "tensor": "tensor_model_parallel_size",
    "expert": "expert_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
}
EXPERT_TENSOR = "expert_tensor_parallel_size"
# The order in which modules of megatron-core have their weights.
FIRST = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight")
LAST = ("decoder.final_layernorm.weight", "decoder.final_layernorm.bias", "output_layer.weight")
NORM = ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias")
OUT = ("self_attention.linear_proj.weight", "self_attention.linear_proj.bias")
# Its own norm of a layer's input is a module before attention, that of TransformerEngine is in it.
ATTENTION = {"local": (*NORM, *OUT), "transformer_engine": (*OUT, *NORM)}
IN_LAYER = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_bias",
    "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm.bias",
    "mlp.router.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
)
IN_EXPERT = ("linear_fc1.weight", "linear_fc2.weight")


def is_megatron_distributed(folder: Path) -> bool:
    """Whether a distributed checkpoint is of megatron-core."""
    return (folder / FORMAT).is_file()


class MegatronDistributedCheckpoint:
    """A checkpoint in the format "torch_dist"; a `Source`.

    Args:
        folder: of an iteration, with `.metadata` and `common.pt`.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def leaves(self) -> Mapping[str, Merged]:
        """Weights by their names in the file, and states as "optimizer.state.STATE.NAME".

        Raises:
            InputError: a file is damaged, or buckets are not those of the weights.
        """
        leaves = DistributedCheckpoint(self._folder).leaves()
        with contents_named(self._folder):
            common = load_torch(self._folder / COMMON)
            return with_states_by_name(leaves, common.get("args"))


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight as one rank has it.

    Args:
        key: in the checkpoint, where layers and experts are stacked.
        name: with the numbers that the rank gives to its layer and expert.
        shape: of the rank's part.
    """

    key: str
    name: str
    shape: tuple[int, ...]


def with_states_by_name(leaves: Mapping[str, Merged], arguments: Any) -> dict[str, Merged]:
    """The leaves of a distributed checkpoint, with states of weights in place of buckets.

    Args:
        leaves: by their names in the file.
        arguments: the program's, which `common.pt` has.
    Raises:
        InputError: the buckets are not those of the weights.
    """
    buckets: dict[tuple[int, int, int], dict[str, dict[int, Merged]]] = {}
    weights = {}
    for name, leaf in leaves.items():
        found = BUCKET.fullmatch(name)
        if found is None:
            weights[name] = leaf
            continue
        place = int(found["optimizer"] or 0), int(found["group"]), int(found["buffer"])
        by_state = buckets.setdefault(place, {})
        by_state.setdefault(found["state"], {})[int(found["bucket"])] = leaf
    if not buckets:
        return weights
    given = _checked(getattr(arguments, "state", None) or {})
    model = {name: leaf for name, leaf in weights.items() if _is_weight(name)}
    has_experts_apart = len({optimizer for optimizer, *_ in buckets}) > 1
    shards = []
    for (optimizer, group, buffer), by_state in sorted(buckets.items()):
        if buffer:
            raise InputError("checkpoint", f"buffer {buffer} of a rank", "weights of one type")
        degrees = {axis: given[name] for axis, name in DEGREES.items()}
        if has_experts_apart and not optimizer:
            degrees["expert"] = 1
        ranks = _ranks_of(group, degrees)
        own = [
            weight
            for weight in _own_weights(model, ranks["pipeline"], degrees, given)
            if not has_experts_apart or (EXPERTS in weight.key) == bool(optimizer)
        ]
        shards += _shards(by_state, own, group, ranks)
    rules = [_rule(key, leaf, given) for key, leaf in model.items()]
    states = merge(shards, rules)
    _check_masters(states, model)
    return weights | states


def _checked(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The program's arguments, where buckets of such a program can be read."""
    missing = sorted({*DEGREES.values(), "transformer_impl"} - set(given))
    if missing:
        raise InputError("common.pt", "no argument " + missing[0], "those of Megatron-LM")
    if given["transformer_impl"] not in ATTENTION:
        expected = f"one of {', '.join(ATTENTION)}"
        raise InputError("transformer_impl", given["transformer_impl"], expected)
    of_experts = given.get(EXPERT_TENSOR)
    if of_experts not in (None, given[DEGREES["tensor"]]):
        expected = f"{given[DEGREES['tensor']]}, as {DEGREES['tensor']} is"
        raise InputError(EXPERT_TENSOR, of_experts, expected)
    if given.get("virtual_pipeline_model_parallel_size"):
        expected = "stages of one chunk; save with --dist-ckpt-optim-fully-reshardable"
        raise InputError("checkpoint", "buckets of virtual stages", expected)
    return given


def _is_weight(name: str) -> bool:
    return name in (*FIRST, *LAST) or name.startswith(LAYERS)


def _ranks_of(group: int, degrees: Mapping[str, int]) -> dict[str, int]:
    """The ranks that a group's number stands for, from the fastest axis on."""
    ranks, rest = {}, group
    for axis, degree in degrees.items():
        ranks[axis], rest = rest % degree, rest // degree
    if rest:
        raise InputError("checkpoint", f"group {group}", f"those of {dict(degrees)} ranks")
    return ranks


def _shards(
    by_state: Mapping[str, Mapping[int, Merged]],
    own: Sequence[_Weight],
    group: int,
    ranks: Mapping[str, int],
) -> Iterator[Shard]:
    """The states of the weights of one group of data ranks."""
    for state, buckets in by_state.items():
        sizes = [buckets[number].shape[0] for number in sorted(buckets)]
        if sorted(buckets) != list(range(len(sizes))):
            expected = f"all {state} of group {group}"
            raise InputError("checkpoint", f"buckets {sorted(buckets)}", expected)
        for weight, (bucket, start) in zip(own, _places(own, sizes, group)):
            flat = Rows(buckets[bucket], start, math.prod(weight.shape))
            yield Shard(f"{STATE}{state}.{weight.name}", ranks, Divided(flat, weight.shape))


def _places(weights: Sequence[_Weight], sizes: Sequence[int], group: int) -> list[tuple[int, int]]:
    """The bucket of each weight and its first element there."""
    places = []
    bucket, at = 0, 0
    for weight in reversed(weights):
        at = -(-at // ALIGNMENT) * ALIGNMENT
        if bucket < len(sizes) and at >= sizes[bucket]:
            bucket, at = bucket + 1, 0
        places.append((bucket, at))
        at += math.prod(weight.shape)
        if bucket == len(sizes) or at > sizes[bucket]:
            expected = f"a bucket of group {group} with {weight.name} {weight.shape} in it"
            raise InputError("checkpoint", f"buckets of {list(sizes)} elements", expected)
        if at == sizes[bucket]:
            bucket, at = bucket + 1, 0
    # What a bucket has beyond its last weight is less than a multiple.
    if bucket < len(sizes) and (bucket + 1 < len(sizes) or sizes[bucket] - at >= ALIGNMENT):
        expected = f"those of {[weight.name for weight in weights]}"
        raise InputError("checkpoint", f"buckets of {list(sizes)} elements", expected)
    return places[::-1]


def _own_weights(
    model: Mapping[str, Merged],
    stage: int,
    degrees: Mapping[str, int],
    given: Mapping[str, Any],
) -> Iterator[_Weight]:
    """The weights of a stage in the model's order, each as a tensor rank has it."""
    num_stages = degrees["pipeline"]
    in_layer = (*ATTENTION[given["transformer_impl"]], *IN_LAYER)
    layers = {key: leaf for key, leaf in model.items() if key.startswith(LAYERS)}
    inside = {key.removeprefix(LAYERS) for key in layers}
    unknown = sorted(name for name in inside if not name.startswith(EXPERTS))
    unknown = [name for name in unknown if name not in in_layer]
    if unknown:
        raise InputError("checkpoint", unknown[0], f"layers with weights of {in_layer}")

    def own(key: str, name: str, num_stacked: int) -> _Weight:
        shape = model[key].shape[num_stacked:]
        for cut in _cuts(key, model[key], given):
            rows = shape[cut.dim] // degrees["tensor"]
            shape = (*shape[: cut.dim], rows, *shape[cut.dim + 1 :])
        return _Weight(key, name, shape)

    if stage == 0:
        yield from (own(key, key, 0) for key in FIRST if key in model)
    num_layers = next(iter(layers.values())).shape[0] // num_stages if layers else 0
    for layer in range(num_layers):
        here = f"{LAYERS}{layer}."
        for name in in_layer:
            if name in inside:
                yield own(f"{LAYERS}{name}", f"{here}{name}", 1)
        experts = [name for name in IN_EXPERT if f"{EXPERTS}{name}" in inside]
        num_experts = layers[f"{LAYERS}{EXPERTS}{experts[0]}"].shape[1] if experts else 0
        for expert in range(num_experts // degrees["expert"]):
            for name in experts:
                key = f"{LAYERS}{EXPERTS}{name}"
                yield own(key, f"{here}{EXPERTS}{expert}.{name}", 2)
    if stage == num_stages - 1:
        yield from (own(key, key, 0) for key in LAST if key in model)
        if LAST[-1] not in model and num_stages > 1:  # tied, and a copy on this stage
            yield own(FIRST[0], FIRST[0], 0)


def _cuts(key: str, leaf: Merged, given: Mapping[str, Any]) -> tuple[Cut, ...]:
    """How tensor ranks share a weight, of which each has as many chunks as blocks are fused."""
    num_ranks, num_stacked = given[DEGREES["tensor"]], _num_stacked(key)
    cuts = []
    for dim in range(num_stacked, len(leaf.shape)):
        chunks = len({placement.starts[dim] for placement in leaf.copies[0]})
        if chunks % num_ranks or leaf.shape[dim] % chunks:
            if chunks == 1:
                continue
            raise InputError(
                "checkpoint", f"{key} in {chunks} chunks", f"{num_ranks} or a multiple"
            )
        num_blocks = chunks // num_ranks
        if num_ranks > 1:
            blocks = (leaf.shape[dim] // num_blocks,) * num_blocks
            cuts.append(Cut("tensor", dim - num_stacked, blocks=blocks))
    return tuple(cuts)


def _num_stacked(key: str) -> int:
    if not key.startswith(LAYERS):
        return 0
    return 2 if EXPERTS in key else 1


def _rule(key: str, leaf: Merged, given: Mapping[str, Any]) -> Rule:
    """Where the states of a weight belong: under its own name, and stacked as it is."""
    cuts = _cuts(key, leaf, given)
    state = rf"(?P<state>{re.escape(STATE)}\w+)\."
    if not key.startswith(LAYERS):
        return Rule(state + re.escape(key), f"{{state}}.{key}", cuts, kind="replicated")
    num_layers = leaf.shape[0] // given[DEGREES["pipeline"]]
    offsets = {"layer": _offset("pipeline", num_layers, given)}
    stack: tuple[str, ...] = ("layer",)
    name = re.escape(key.removeprefix(LAYERS))
    if EXPERTS in key:
        num_experts = leaf.shape[1] // given[DEGREES["expert"]]
        offsets["expert"] = _offset("expert", num_experts, given)
        stack = ("layer", "expert")
        inner = re.escape(key.removeprefix(LAYERS + EXPERTS))
        name = rf"{re.escape(EXPERTS)}(?P<expert>\d+)\.{inner}"
    match = rf"{state}{re.escape(LAYERS)}(?P<layer>\d+)\.{name}"
    return Rule(match, f"{{state}}.{key}", cuts, kind="replicated", stack=stack, offsets=offsets)


def _offset(axis: str, number: int, given: Mapping[str, Any]) -> Offset:
    return Offset(axis, tuple(rank * number for rank in range(given[DEGREES[axis]])))


def _check_masters(states: Mapping[str, Merged], model: Mapping[str, Merged]) -> None:
    """Raises InputError unless each weight has states of its shape, and a master like itself."""
    for path, state in states.items():
        _, _, key = path.removeprefix(STATE).partition(".")
        if state.shape != model[key].shape:
            raise InputError("checkpoint", f"{path} {state.shape}", f"shape {model[key].shape}")
    for key, weight in model.items():
        master = states.get(f"{STATE}{MASTER}.{key}")
        if master is None:
            raise InputError("checkpoint", f"no float32 master of {key}", "one of each weight")
        for part in weight.copies[0]:
            box = tuple(
                slice(start, start + min(size, NUM_COMPARED))
                for start, size in zip(part.starts, part.sizes)
            )
            if not np.array_equal(master[box].astype(weight.dtype), weight[box]):
                expected = f"the float32 master of {key} at {part.starts}"
                raise InputError("checkpoint", "other numbers in a bucket", expected)
