"""Checkpoints of DeepSpeed: ZeRO 1, 2 and 3 over data and tensor ranks, and universal folders.

Source: Rajbhandari et al. 2019 (arXiv 1910.02054), for the partitions. That of ZeRO 1 or 2 is a
range of all parameters of a group, one after the other. ZeRO 3 cuts each parameter by itself and
pads the last parts. Leaves are called "fp32/NAME", "exp_avg/NAME" and so on, for whatever states
the optimizer has.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import deepspeed_copies
from jaxscale.checkpoint.boxes import Merged, Placement, flat_boxes
from jaxscale.checkpoint.deepspeed_patterns import rules_of
from jaxscale.checkpoint.deepspeed_universal import (
    MODEL_FILE,
    UNIVERSAL,
    WEIGHTS,
    universal_leaves,
)
from jaxscale.checkpoint.file_array import FileArray, is_plain_name
from jaxscale.checkpoint.patterns import Rule
from jaxscale.checkpoint.pickled import Named
from jaxscale.checkpoint.source import LazyArray, contents_named
from jaxscale.checkpoint.torch_file import Tensor, load_torch
from jaxscale.checkpoint.universal import Shard, merge
from jaxscale.types import InputError

LATEST = ("latest_universal", "latest")
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")
UNREAD_SETTING = "use_data_before_expert_parallelism"
INFO = "universal_checkpoint_info"


@dataclasses.dataclass(frozen=True)
class _Range:
    """Elements of one flattened parameter, and where they are in a rank's flat partition."""

    rank: int
    first: int
    size: int
    at: int


def names_latest(folder: Path) -> bool:
    """Whether a file of the folder says which of its checkpoints is the newest."""
    return any((folder / name).is_file() for name in LATEST)


def find_tag(folder: Path) -> Path | None:
    """The folder of a checkpoint, which is `folder` or the one that its file `latest` names."""
    for name in LATEST:
        if (folder / name).is_file():
            tag = (folder / name).read_text().strip()
            if not is_plain_name(tag):
                raise InputError(str(folder / name), tag, "the name of a folder beside it")
            folder = folder / tag
            break
    names = [path.name for path in folder.glob("*_states.pt")]
    is_partitioned = any(OPTIMIZER_FILE.fullmatch(name) for name in names)
    return folder if is_partitioned or (folder / UNIVERSAL).is_dir() else None


class DeepSpeedCheckpoint:
    """A checkpoint that DeepSpeed has written under ZeRO, or its universal form; a `Source`.

    Args:
        folder: as `find_tag` returns it.
        rules: for the parts of tensor and pipeline ranks; those in the checkpoint when None.
    """

    def __init__(self, folder: Path, rules: tuple[Rule, ...] | None = None):
        self._folder = folder
        self._rules = rules

    def leaves(self) -> Mapping[str, LazyArray]:
        """Each state of each parameter by its path, "fp32/NAME" and so on; nothing is read.

        Raises:
            InputError: a file is missing or damaged, or the parts do not make up parameters.
        """
        if (self._folder / UNIVERSAL).is_dir():
            return universal_leaves(self._folder / UNIVERSAL)
        with contents_named(self._folder):
            return self._merged()

    def _merged(self) -> Mapping[str, LazyArray]:
        """The leaves of all ranks' files."""
        models, optimizers = self._files()
        shards: list[Shard] = []
        info: dict[str, Any] = {}
        for number, by_data in optimizers.items():
            model, *others = map(load_torch, models[number])
            info = info or model.get(INFO) or {}
            ranks = _ranks_of(number, model)
            joined = _joined_over_data(by_data, model)
            _check_ranks(self._folder, model, models, by_data)
            joined |= _untrained([model, *others])
            for (state, name), array in joined.items():
                shards.append(Shard(name, ranks, array, state))
        weights = [shard for shard in shards if shard.state == WEIGHTS]
        shards += deepspeed_copies.untrained(self._folder, weights)
        rules = self._rules or rules_of(info, shards)
        return merge(shards, rules)

    def _files(self) -> tuple[dict[int, list[Path]], dict[int, dict[int, Path]]]:
        """The model files of each model-parallel rank and its optimizer files by data rank.

        Under ZeRO 3 there is a model file for each data rank, in whose order they come.

        A file that is neither is refused: nothing of a checkpoint is left out.
        """
        models: dict[int, list[Path]] = {}
        optimizers: dict[int, dict[int, Path]] = {}
        for path in sorted(self._folder.glob("*_states.pt"), key=_in_order):
            if found := OPTIMIZER_FILE.fullmatch(path.name):
                optimizers.setdefault(int(found[2]), {})[int(found[1])] = path
            elif found := MODEL_FILE.fullmatch(path.name):
                models.setdefault(int(found[2]), []).append(path)
            elif not deepspeed_copies.is_copy(path):
                expected = "files of ZeRO over data and tensor ranks; this one is not read"
                raise InputError("checkpoint", str(path), expected)
        for number in sorted({*models, *optimizers}):
            for found, kind in ((models, "model"), (optimizers, "optim")):
                if number not in found:
                    expected = f"a file mp_rank_{number:02d}_{kind}_states.pt"
                    raise InputError("checkpoint", str(self._folder), expected)
        return models, optimizers


def _in_order(path: Path) -> list[int]:
    """The numbers in a file's name, which may have any number of digits."""
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _check_ranks(
    folder: Path,
    model: dict[str, Any],
    models: dict[int, list[Path]],
    by_data: dict[int, Path],
) -> None:
    """Raises InputError unless each model-parallel rank is there, and each model file under ZeRO 3.

    Args:
        folder: of the checkpoint.
        model: what the model file of one rank holds.
        models: of all ranks.
        by_data: optimizer files of that rank.
    """
    degrees = model.get("checkpoint_parallel_dimensions") or {}
    number = degrees.get("tp_degree", 1) * degrees.get("pp_degree", 1)
    number = number if degrees else model.get("mp_world_size", len(models))
    if missing := sorted(set(range(number)) - set(models)):
        expected = f"files of {number} model-parallel ranks; missing are {missing}"
        raise InputError("checkpoint", str(folder), expected)
    for rank, files in models.items():
        owners = [MODEL_FILE.fullmatch(path.name)[1] for path in files]
        if owners != [None] and [int(owner or 0) for owner in owners] != sorted(by_data):
            expected = f"model files of mp_rank_{rank:02d} of data ranks {sorted(by_data)}"
            raise InputError("checkpoint", str(folder), expected)


def _ranks_of(number: int, model: dict[str, Any]) -> dict[str, int]:
    """Tensor and pipeline rank of a model-parallel rank."""
    degrees = model.get("checkpoint_parallel_dimensions") or {}
    num_tensor = degrees.get("tp_degree", 1)
    return {"tensor": number % num_tensor, "pipeline": number // num_tensor}


def _joined_over_data(
    by_data: dict[int, Path], model: dict[str, Any]
) -> dict[tuple[str, str], Merged]:
    """(state, name) -> a parameter of one model-parallel rank from its data-parallel parts."""
    files = {rank: load_torch(path)["optimizer_state_dict"] for rank, path in by_data.items()}
    first = next(iter(files.values()))
    counts = _partition_counts(first, len(model["param_shapes"]))
    missing = sorted(set(range(max(counts))) - set(files))
    if missing:
        path = next(iter(by_data.values()))
        expected = f"a file for each of {max(counts)} data ranks; missing are {missing}"
        raise InputError("checkpoint", str(path.parent), expected)
    joined = {}
    for group, shapes in enumerate(model["param_shapes"]):
        num_expert_ranks = _num_expert_ranks(files, counts[group], model)
        for expert_rank in range(num_expert_ranks):
            own = {rank: files[rank] for rank in sorted(files)[expert_rank::num_expert_ranks]}
            names = dict.fromkeys(shapes)
            if num_expert_ranks > 1:
                names = _names_in_model(shapes, expert_rank)
            for (state, name), array in _joined_group(own, group, shapes).items():
                joined[state, names[name] or name] = array
    return joined


def _untrained(models: list[dict[str, Any]]) -> dict[tuple[str, str], LazyArray]:
    """(state, name) -> what no optimizer has: frozen parameters, and buffers such as a mean.

    Args:
        models: model files of one model-parallel rank, of each data rank under ZeRO 3.
    """
    first = models[0]
    found: dict[tuple[str, str], LazyArray] = {}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        parts = {rank: model["frozen_param_fragments"][name] for rank, model in enumerate(models)}
        size = -(-math.prod(shape) // len(parts))
        ranges = []
        for rank in parts:
            held = min(size, math.prod(shape) - rank * size)
            if held > 0:
                ranges.append(_Range(rank, rank * size, held, 0))
        found[WEIGHTS, name] = _join(f"{WEIGHTS}/{name}", shape, ranges, parts)
    trained = {name for shapes in first["param_shapes"] for name in shapes}
    known = {*trained, *(first.get("shared_params") or {})}
    for name, array in (first.get("module") or {}).items():
        if name not in known and (WEIGHTS, name) not in found and isinstance(array, Tensor):
            found[WEIGHTS, name] = array
    return found


def _joined_group(
    files: dict[int, dict[str, Any]],
    group: int,
    shapes: dict[str, tuple[int, ...]],
) -> dict[tuple[str, str], Merged]:
    """(state, name) -> a parameter of one group of the optimizer, from the ranks that share it."""
    is_zero_3 = "fp32_flat_groups" in next(iter(files.values()))
    flat = {rank: _flat_states(file, group, is_zero_3) for rank, file in files.items()}
    find = _ranges_of_3 if is_zero_3 else _ranges_of_1
    ranges = find(files, group, shapes)
    joined = {}
    first = next(iter(flat.values()))
    for rank, states in flat.items():
        if states.keys() != first.keys():
            expected = f"{sorted(first)}, as rank {min(flat)} has of group {group}"
            raise InputError(f"data rank {rank}", sorted(states), expected)
    for state in first:
        parts = {rank: states[state] for rank, states in flat.items()}
        for name, shape in shapes.items():
            joined[state, name] = _join(f"{state}/{name}", shape, ranges[name], parts)
    return joined


def _partition_counts(file: dict[str, Any], num_groups: int) -> list[int]:
    """Over how many data ranks each group of parameters is partitioned."""
    count = file["partition_count"]
    return list(count) if isinstance(count, list | tuple) else [count] * num_groups


def _num_expert_ranks(files: dict[int, Any], count: int, model: dict[str, Any]) -> int:
    """Over how many expert ranks a group's parameters differ; consecutive data ranks hold them."""
    if count == len(files):
        return 1
    settings = model.get("ds_config") or {}
    if len(files) % count or settings.get(UNREAD_SETTING, False):
        expected = f"consecutive data ranks with different experts, without {UNREAD_SETTING}"
        raise InputError("partition_count", f"{count} of {len(files)} data ranks", expected)
    return len(files) // count


def _names_in_model(names: Iterable[str], expert_rank: int) -> dict[str, str]:
    """Each name of an expert's parameter with the number that the expert has in the model."""
    found = {name: EXPERT.fullmatch(name) for name in names}
    num_own: dict[str, int] = collections.Counter()
    for name, match in found.items():
        if match is None:
            raise InputError("checkpoint", name, "an expert's parameter: ranks hold different ones")
        num_own[match[1]] = max(num_own[match[1]], 1 + int(match[2]))
    return {
        name: f"{match[1]}{expert_rank * num_own[match[1]] + int(match[2])}{match[3]}"
        for name, match in found.items()
    }


def _flat_states(file: dict[str, Any], group: int, is_zero_3: bool) -> dict[str, Tensor]:
    """The flat partitions of one rank and group: the weights and each state of the optimizer."""
    weights, optimizer = "single_partition_of_fp32_groups", "base_optimizer_state"
    if is_zero_3:
        weights, optimizer = "fp32_flat_groups", "optimizer_state_dict"
    flat = {WEIGHTS: file[weights][group]}
    for name, value in file[optimizer]["state"].get(group, {}).items():
        if isinstance(value, FileArray) and value.shape == flat[WEIGHTS].shape:
            flat[name] = value
    return flat


def _ranges_of_1(
    files: dict[int, dict[str, Any]], group: int, shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[_Range]]:
    """Under ZeRO 1 and 2, what each rank says that its partition has of each parameter."""
    ranges: dict[str, list[_Range]] = {name: [] for name in shapes}
    for rank in sorted(files):
        for name, address in files[rank]["param_slice_mappings"][group].items():
            at, size = _address(address)
            first = sum(part.size for part in ranges[name])
            ranges[name].append(_Range(rank, first, size, at))
    return ranges


def _ranges_of_3(
    files: dict[int, dict[str, Any]], _group: int, shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[_Range]]:
    """Under ZeRO 3 each rank has an equal part of each parameter, of which the last are padded."""
    ranges: dict[str, list[_Range]] = {}
    at = 0
    for name, shape in shapes.items():
        num_elements = math.prod(shape)
        part = -(-num_elements // len(files))
        ranges[name] = []
        for rank in sorted(files):
            size = min(part, num_elements - rank * part)
            if size > 0:
                ranges[name].append(_Range(rank, rank * part, size, at))
        at += part
    return ranges


def _address(address: Any) -> tuple[int, int]:
    """First element and size of a `fragment_address`."""
    if not isinstance(address, Named):
        raise InputError("param_slice_mappings", address, "addresses of fragments")
    if isinstance(address.state, dict):
        return address.state["start"], address.state["numel"]
    numel, start = address.arguments or ()
    return start, numel


def _join(
    name: str,
    shape: tuple[int, ...],
    ranges: list[_Range],
    parts: dict[int, FileArray],
) -> Merged:
    """A parameter from ranges of flat partitions."""
    placements = []
    for each in ranges:
        flat = parts[each.rank]
        at = each.at
        for corner, sizes in flat_boxes(shape, each.first, each.first + each.size):
            placements.append(
                Placement(
                    part=flat.part(at, sizes),
                    reads=(0,) * len(shape),
                    starts=corner,
                    sizes=sizes,
                    steps=(1,) * len(shape),
                    origin=f"data rank {each.rank}",
                )
            )
            at += math.prod(sizes)
    dtype = next(iter(parts.values())).dtype
    return Merged(name, shape, dtype, (tuple(placements),))
