"""What Megatron-LM saved by tensor, pipeline and expert rank (its format "torch").

`iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` holds the weights of one rank under the
names of megatron-core; the layers of a stage count from 0. With them come the states of its
optimizer, "exp_avg/NAME" and so on, and in place of 16-bit weights their float32 masters; those of
the distributed optimizer are in a file beside it. Its format "torch_dist" is that of
`torch_distributed`.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import megatron_buffers
from jaxscale.checkpoint.boxes import Merged
from jaxscale.checkpoint.megatron_optimizer import Weight, lacks_states, states_of
from jaxscale.checkpoint.patterns import Cut, Offset, Rule
from jaxscale.checkpoint.pickled import Named
from jaxscale.checkpoint.source import contents_named
from jaxscale.checkpoint.torch_file import Tensor, load_torch
from jaxscale.checkpoint.universal import Shard, merge
from jaxscale.types import InputError

LATEST = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
AXES = ("tensor", "pipeline", "expert")
TENSOR, STAGES = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT_TENSOR = "expert_tensor_parallel_size"
MODEL = re.compile(r"model(\d*)")  # one a chunk where stages have several
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

# Dense weights are on all expert ranks, and tied embeddings on two stages.
KIND = "replicated"
COLUMN, ROW = Cut("tensor", 0), Cut("tensor", 1)
IN_LAYER = r"decoder\.layers\.(?P<layer>\d+)\."
TO_LAYER = "decoder.layers.{layer}."
EXPERT = r"(?P<rest>mlp\.experts\.local_experts)\.(?P<expert>\d+)\."
TO_EXPERT = "{rest}.{expert}."


def latest_iteration(folder: Path) -> Path:
    """The folder of the iteration that the folder's file of the latest names, or `folder`."""
    if not (folder / LATEST).is_file():
        return folder
    number = (folder / LATEST).read_text().strip()
    if not number.isdecimal():
        raise InputError(str(folder / LATEST), number, "the number of an iteration")
    return folder / f"iter_{int(number):07d}"


def is_megatron(folder: Path) -> bool:
    """Whether a folder is an iteration by ranks."""
    return any(folder.glob(f"mp_rank_*/{FILE}"))


class MegatronCheckpoint:
    """The weights of a checkpoint of Megatron-LM; a `Source`.

    Args:
        folder: of an iteration.
        rules: in place of those of megatron-core's names.
    """

    def __init__(self, folder: Path, rules: tuple[Rule, ...] | None = None):
        self._folder = folder
        self._rules = rules

    def leaves(self) -> Mapping[str, Merged]:
        """Each weight by its name, with the number that its layer has in the model.

        Raises:
            InputError: a file is damaged, or the ranks' parts do not make up the weights.
        """
        with contents_named(self._folder):
            files = {path: load_torch(path / FILE) for path in self._folder.glob("mp_rank_*")}
            arguments = _arguments_of(next(iter(files.values())))
            ranks = {path: _ranks_of(path, arguments) for path in sorted(files)}
            _check_ranks(self._folder, list(ranks.values()), arguments)
            num_stages = 1 + max(own["pipeline"] for own in ranks.values())
            shards = []
            for path, own in ranks.items():
                shards += list(_shards(path, own, files[path], num_stages))
            rules = self._rules or _used(megatron_rules(shards, arguments), shards)
            return merge(shards, rules)


def _arguments_of(content: dict[str, Any]) -> Mapping[str, Any]:
    """The program's arguments, which are beside a rank's weights; none where they are not."""
    arguments = content.get("args")
    return (arguments.state if isinstance(arguments, Named) else None) or {}


def megatron_rules(shards: list[Shard], given: Mapping[str, Any]) -> tuple[Rule, ...]:
    """How megatron-core cuts each kind of weight.

    Args:
        shards: of all ranks.
        given: the program's arguments, of which `vocab_size` and `swiglu` are read.
    """
    vocabulary = Cut("tensor", 0, size=given.get("vocab_size"))
    offsets = {"layer": Offset("virtual", _first_layers(shards))}
    of_experts = offsets | {"expert": Offset("expert", _first_experts(shards))}

    def first_matrix(prefix: str) -> Cut:
        """Gate and up are fused where the model has a gate."""
        if not given.get("swiglu", False):
            return COLUMN
        return _gated(shards, rf"{prefix}linear_fc1\.weight")

    rules = []
    for names, cuts in {
        r"embedding\.word_embeddings\.weight|output_layer\.weight": (vocabulary,),
        r"embedding\.position_embeddings\.weight": (),
        r"decoder\.final_(layer)?norm\.(weight|bias)": (),
    }.items():
        rules.append(Rule(names, cuts=cuts, kind=KIND))
    for names, cuts in {
        r"self_attention\.linear_qkv\.(weight|bias)": (COLUMN,),
        r"self_attention\.linear_proj\.weight": (ROW,),
        r"mlp\.linear_fc1\.(weight|bias)": (first_matrix(rf"{IN_LAYER}mlp\."),),
        r"mlp\.linear_fc2\.weight": (ROW,),
        r"(self_attention\.linear_proj|mlp\.linear_fc2)\.bias": (),
        r".*norm(\.|_)(weight|bias)": (),
        r"mlp\.router\.(weight|expert_bias)": (),
    }.items():
        match = f"{IN_LAYER}(?P<name>{names})"
        to = f"{TO_LAYER}{{name}}"
        rules.append(Rule(match, to, cuts, kind=KIND, offsets=offsets))
    for name, cut in {
        r"linear_fc1\.weight": first_matrix(f"{IN_LAYER}{EXPERT}"),
        r"linear_fc2\.weight": ROW,
    }.items():
        match = f"{IN_LAYER}{EXPERT}(?P<name>{name})"
        to = f"{TO_LAYER}{TO_EXPERT}{{name}}"
        rules.append(Rule(match, to, (cut,), kind=KIND, offsets=of_experts))
    return tuple(rules)


def _ranks_of(path: Path, given: Mapping[str, Any]) -> dict[str, int]:
    """A rank's numbers; that of the stage is left out where the program had one stage."""
    found = RANK.fullmatch(path.name)
    if found is None:
        raise InputError("checkpoint", str(path), "a folder mp_rank_TT, _PPP and _EEE")
    tensor, stage, expert = (int(number or 0) for number in found.groups())
    if found[3] is None and given.get(STAGES) == 1:
        stage, expert = 0, stage
    return dict(zip(AXES, (tensor, stage, expert)))


def _check_ranks(folder: Path, ranks: list[dict[str, int]], given: Mapping[str, Any]) -> None:
    """Raises InputError unless there is a folder of each rank that the program had."""
    of_experts = given.get(EXPERT_TENSOR)
    if of_experts not in (None, given.get(TENSOR, of_experts)):
        expected = f"{given[TENSOR]}, as {TENSOR} is: experts are cut as other weights are"
        raise InputError(f"{folder}: {EXPERT_TENSOR}", of_experts, expected)
    numbers = []
    for axis in AXES:
        found = 1 + max(own[axis] for own in ranks)
        number = given.get(f"{axis}_model_parallel_size", found)
        # Experts that ranks share out are told apart by a folder's third number, others are not.
        numbers.append(found if axis == "expert" and found == 1 else number)
    having = {tuple(own.values()) for own in ranks}
    for wanted in itertools.product(*map(range, numbers)):
        if wanted not in having:
            missing = ", ".join(f"{axis}={rank}" for axis, rank in zip(AXES, wanted))
            raise InputError("checkpoint", str(folder), f"a folder of rank {missing}")


def _shards(
    path: Path,
    ranks: Mapping[str, int],
    content: dict[str, Any],
    num_stages: int,
) -> Iterator[Shard]:
    """What one rank holds; "virtual" numbers its chunks of layers in the model's order."""
    # The stage is in the number of its chunk.
    stage = ranks["pipeline"]
    others = {axis: number for axis, number in ranks.items() if axis != "pipeline"}
    shards: dict[tuple[int, str], Shard] = {}
    weights = []
    for key, chunk in content.items():
        found = MODEL.fullmatch(key)
        if found is None or not isinstance(chunk, dict):
            continue
        number = int(found[1] or 0)
        own = others | {"virtual": number * num_stages + stage}
        for name, tensor in chunk.items():
            # "_extra_state" is bytes of another library and no weight.
            if isinstance(tensor, Tensor):
                shards[number, name] = Shard(name, own, tensor)
                weights.append(Weight((number, name), name, tensor))
    for key, state, values in _states(path, stage, content, weights, num_stages):
        if values is None:
            del shards[key]
            continue
        shard = dataclasses.replace(shards[key], array=values, state=state or "")
        if state is None:
            shards[key] = shard
        else:
            yield shard
    yield from shards.values()


def _states(
    path: Path,
    stage: int,
    content: dict[str, Any],
    weights: list[Weight],
    num_stages: int,
) -> Iterator[megatron_buffers.Found]:
    """What a rank's optimizer has of its weights."""
    buffers = path / megatron_buffers.FILE
    if not buffers.is_file():
        if lacks_states(content.get("optimizer")) and content.get("iteration", 0):
            expected = "what the distributed optimizer has beside its weights"
            raise InputError("checkpoint", f"no file {buffers}", expected)
        return states_of(content.get("optimizer"), weights, str(path))
    return megatron_buffers.buffered_states(
        buffers,
        weights,
        _arguments_of(content),
        stage=stage,
        num_stages=num_stages,
    )


def _first_layers(shards: list[Shard]) -> tuple[int, ...]:
    """The first layer of each chunk."""
    counts: dict[int, int] = {}
    for shard in shards:
        chunk = shard.ranks["virtual"]
        found = LAYER.match(shard.name)
        own = 1 + int(found[1]) if found else 0
        counts[chunk] = max(counts.get(chunk, 0), own)
    firsts, total = [], 0
    for chunk in range(len(counts)):
        firsts.append(total)
        total += counts[chunk]
    return tuple(firsts)


def _first_experts(shards: list[Shard]) -> tuple[int, ...]:
    """The first expert of each expert rank; all have the same number of them."""
    pattern = re.compile(f"{IN_LAYER}{EXPERT}.*")
    num_own, num_ranks = 1, 1
    for shard in shards:
        num_ranks = max(num_ranks, 1 + shard.ranks["expert"])
        found = pattern.fullmatch(shard.name)
        if found:
            num_own = max(num_own, 1 + int(found["expert"]))
    return tuple(rank * num_own for rank in range(num_ranks))


def _gated(shards: list[Shard], pattern: str) -> Cut:
    """How gate and up, fused in one weight, are cut: each by itself."""
    num_ranks = 1 + max(shard.ranks["tensor"] for shard in shards)
    for shard in shards:
        if re.fullmatch(pattern, shard.name):
            width = shard.array.shape[0] * num_ranks // 2
            return Cut("tensor", 0, blocks=(width, width))
    return COLUMN


def _used(rules: tuple[Rule, ...], shards: list[Shard]) -> tuple[Rule, ...]:
    """The rules of what the model has: not every model has experts or biases."""
    names = {shard.name for shard in shards}
    used = []
    for rule in rules:
        pattern = re.compile(rule.match)
        if any(map(pattern.fullmatch, names)):
            used.append(rule)
    return tuple(used)
