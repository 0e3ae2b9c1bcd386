"""The masters and states that megatron-core's distributed optimizer has in flat buffers.

Source: `megatron.core.distributed.param_and_grad_buffer`. The weights of one type lie in a buffer
from the model's last to its first, each from a multiple of 64 elements on. A bucket ends with the
weight that fills it, and tied embeddings of several stages have one of their own. What all data
ranks hold is put together in one file, without the padding between buckets.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.checkpoint.megatron_optimizer import BUFFER, EXPERTS, Weight
from jaxscale.checkpoint.torch_file import Tensor, load_torch, torch_dtype
from jaxscale.types import InputError

FILE = "distrib_optim.pt"
JOINED, SIZE, MASTER = "buckets_coalesced", "numel_unpadded", "param"
ALIGNMENT = 64  # elements
BUCKET, BUCKET_OF_RANK = 40_000_000, 1_000_000
TIED = ("embedding.word_embeddings.weight", "output_layer.weight")
NUM_COMPARED = 8  # rows

Found = tuple[Any, str | None, Tensor | None]


def buffered_states(
    path: Path,
    weights: Sequence[Weight],
    arguments: Mapping[str, Any],
    *,
    stage: int,
    num_stages: int,
) -> Iterator[Found]:
    """(key of a weight, name of its state, values); a float32 master has no name of a state.

    Values are None where another rank's file has them.

    Args:
        path: of the file.
        weights: of the rank, in the model's order, with keys (chunk, name).
        arguments: the program's, which say how large buckets are and whether embeddings are tied.
        stage: of the rank.
        num_stages: of the pipeline.
    Raises:
        InputError: the buffers are not those of the weights.
    """
    content = load_torch(path)
    parts = content if isinstance(content, list) else [content]
    own = [weight for weight in weights if not weight.name.endswith(BUFFER)]
    groups = [own]
    if len(parts) > 1:  # of experts that expert ranks share out
        groups = [[], []]
        for weight in own:
            groups[EXPERTS in weight.name].append(weight)
    if len(parts) != len(groups):
        expected = "one optimizer, or one of experts beside it"
        raise InputError(str(path), f"{len(parts)} optimizers", expected)
    is_tied = num_stages > 1 and not arguments.get("untie_embeddings_and_output_weights", False)
    for part, group in zip(parts, groups):
        if part is None:
            yield from ((weight.key, None, None) for weight in group)
            continue
        if not part.get(JOINED, False):
            expected = "buffers whose buckets are joined, as Megatron-LM writes since 2024"
            raise InputError(str(path), sorted(map(str, part)), expected)
        buffers = [each for number, each in part.items() if number != JOINED]
        held = _by_buffer(group)
        if len(buffers) != len(held):
            raise InputError(str(path), f"{len(buffers)} buffers", f"one for each of {list(held)}")
        for ((kind, values),), (chunk, dtype) in zip(map(dict.items, buffers), held):
            size = None if stage or chunk else _bucket_size(arguments)
            inside = held[chunk, dtype]
            starts, end = _starts(inside, size, TIED if is_tied else ())
            if torch_dtype(kind[0]) != dtype or values[SIZE] != end:
                found = f"{values[SIZE]} elements of {kind[0].name}"
                expected = f"{end} of {dtype}, with buckets of {size} elements"
                raise InputError(str(path), found, expected)
            yield from _cut(values, inside, starts, str(path))


def _by_buffer(weights: Sequence[Weight]) -> dict[tuple[int, np.dtype], list[Weight]]:
    """The weights of each chunk of the model and type, in their order."""
    held: dict[tuple[int, np.dtype], list[Weight]] = {}
    for weight in weights:
        chunk, _ = weight.key
        held.setdefault((chunk, weight.tensor.dtype), []).append(weight)
    return held


def _bucket_size(arguments: Mapping[str, Any]) -> int | None:
    """Elements that fill a bucket of the first stage's first chunk; others have one bucket."""
    if not arguments.get("overlap_grad_reduce", False):
        return None
    usual = max(BUCKET, BUCKET_OF_RANK * arguments.get("data_parallel_size", 1))
    return arguments.get("ddp_bucket_size") or usual


def _starts(
    weights: Sequence[Weight],
    bucket_size: int | None,
    tied: Sequence[str],
) -> tuple[list[int], int]:
    """The first element of each weight in its buffer, and one past the last of all."""
    starts = []
    bucket, at = 0, 0  # where the bucket starts, and how much of it is filled
    for weight in reversed(weights):
        at = -(-at // ALIGNMENT) * ALIGNMENT
        is_alone = weight.name in tied
        if is_alone:
            bucket, at = bucket + at, 0
        starts.append(bucket + at)
        at += math.prod(weight.tensor.shape)
        if is_alone or (bucket_size is not None and at >= bucket_size):
            bucket, at = bucket + at, 0
    return starts[::-1], bucket + at


def _cut(
    values: Mapping[str, Any],
    weights: Sequence[Weight],
    starts: Sequence[int],
    where: str,
) -> Iterator[Found]:
    """The parts of a buffer, whose masters are compared with the weights that they belong to."""
    for weight, start in zip(weights, starts):
        shape = weight.tensor.shape
        master = values[MASTER].part(start, shape)
        rows = tuple(slice(0, min(size, NUM_COMPARED)) for size in shape)
        if not np.array_equal(master[rows].astype(weight.tensor.dtype), weight.tensor[rows]):
            expected = f"the float32 master of {weight.name} from element {start} on"
            raise InputError(where, "other numbers", expected)
        yield weight.key, None, master
        for name, flat in values.items():
            if name not in (MASTER, SIZE):
                yield weight.key, name, flat.part(start, shape)
