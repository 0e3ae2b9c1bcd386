"""Low-rank adapters as folders of PEFT: adapter_config.json and adapter_model.safetensors.

PEFT has one adapter for a module of Hugging Face. Where several of our matrices are fused in a
module, reading gives each of them the module's A and its rows of B, and writing stacks their A and
sets their B side by side, so that a model computes the same.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.safetensors import NewTensor, read_header, write_file
from jaxscale.convert.fields import Fields, read_json
from jaxscale.convert.places import Layout, Share, plan
from jaxscale.models.config import LoraConfig, ModelConfig
from jaxscale.models.lora import ADAPTER, Adapters, without_adapters
from jaxscale.models.parameters import parameter_table
from jaxscale.types import InputError, Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BEGIN = "base_model.model."
# They say nothing of what a trained adapter computes.
IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
# Other kinds of adapters, which these fields would make of it.
KINDS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "lora_ga_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


def read_adapters(
    directory: str | Path,
    config: ModelConfig,
    layout: Layout,
) -> Adapters:
    """The adapters in a folder of PEFT.

    Args:
        directory: the folder.
        config: the model, which has no adapters.
        layout: of its family.
    Raises:
        InputError: a file or a tensor is missing, unknown or of another shape, layers have adapters
            of different modules, or it is no plain LoRA; it is named.
    """
    folder = Path(directory).expanduser()
    lora = _read_config(folder / CONFIG)
    tensors = read_header(folder / WEIGHTS)
    values = {name: tensor[()].astype(np.float32) for name, tensor in tensors.items()}
    table, leaves, targets = tree.flatten(parameter_table(config)), {}, {}
    used = set()
    for share in _adaptable(config, layout):
        names = _names(share.tensor)
        if names[0] not in values:
            continue
        used |= set(names)
        a, b = (_taken(values, name, folder) for name in names)
        _check_shapes(share, a, b, lora.rank, folder)
        target = share.leaf.rpartition("/")[2]
        targets[target] = None
        for part, box in zip("ab", (_a_of(share, a), _b_of(share, b)), strict=True):
            path = f"{share.leaf}{ADAPTER}/{part}"
            stack = table[share.leaf].shape[:1] if share.index else ()
            leaf = leaves.setdefault(path, np.full((*stack, *box.shape), np.nan, np.float32))
            leaf[share.index] = box
    if unknown := sorted(values.keys() - used):
        raise InputError(f"{folder / WEIGHTS}: {unknown[0]}", None, "no such adapter in the model")
    lora = dataclasses.replace(lora, targets=tuple(targets))
    _check_whole(leaves, dataclasses.replace(config, lora=lora), folder)
    return Adapters(lora, leaves)


def write_adapters(
    directory: str | Path,
    config: ModelConfig,
    layout: Layout,
    params: Params,
) -> None:
    """Writes a model's adapters as a folder of PEFT, in float32.

    Args:
        directory: a folder without adapters; made if need be.
        config: the model, with adapters.
        layout: of its family.
        params: the parameter tree.
    Raises:
        InputError: the model has no adapters or also a value head, or the folder has adapters.
    """
    folder = Path(directory).expanduser()
    if config.lora is None:
        raise InputError("ModelConfig.lora", None, "adapters to write")
    if config.use_value_head:
        expected = "False for adapters alone, beside which a value head would be lost"
        raise InputError("ModelConfig.use_value_head", True, expected)
    if (folder / CONFIG).exists():
        raise InputError("directory", str(folder), f"a folder without an {CONFIG}")
    leaves = tree.flatten(params)
    modules: dict[str, list[Share]] = {}
    for share in _adaptable(without_adapters(config), layout):
        if f"{share.leaf}{ADAPTER}/a" in leaves:
            modules.setdefault(share.tensor, []).append(share)
    # All modules have the rank of the one with the most parts, for PEFT to need no patterns.
    num_parts = max(map(len, modules.values()))
    rank = config.lora.rank * num_parts
    tensors = []
    for tensor, shares in modules.items():
        pair = _stacked(shares, leaves, rank, config.lora.rank)
        for name, array in zip(_names(tensor), pair, strict=True):
            tensors.append(NewTensor(name, array.shape, array.dtype, lambda array=array: array))
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS, tensors)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": config.lora.alpha * num_parts,
        "bias": "none",
        "fan_in_fan_out": layout.is_input_first,
        "target_modules": sorted({_module(tensor).rpartition(".")[2] for tensor in modules}),
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def _read_config(file: Path) -> LoraConfig:
    fields = Fields(read_json(file), str(file), IGNORED)
    fields.expect("peft_type", "LORA")
    fields.expect("bias", "none")
    for name in KINDS:
        fields.expect(name, False, (), {}, [])
    rank, alpha = fields.take("r", int), fields.take("lora_alpha", float)
    if fields.take("use_rslora", bool, False):
        alpha *= math.sqrt(rank)  # its scale is alpha / sqrt(r)
    fields.finish()
    return LoraConfig(rank, alpha)


def _adaptable(config: ModelConfig, layout: Layout) -> list[Share]:
    """The shares of the matrices that can have adapters."""
    every = dataclasses.replace(config, lora=LoraConfig(1))
    adapted = tree.flatten(parameter_table(every))
    shares = [share for parts in plan(config, layout).values() for share in parts]
    return [share for share in shares if f"{share.leaf}{ADAPTER}/a" in adapted]


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _names(tensor: str) -> tuple[str, str]:
    """The names of A and B."""
    module = f"{BEGIN}{_module(tensor)}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _taken(values: dict[str, np.ndarray], name: str, folder: Path) -> np.ndarray:
    if name not in values:
        raise InputError(f"{folder / WEIGHTS}: {name}", None, "a tensor beside its pair's other")
    return values[name]


def _check_shapes(
    share: Share,
    a: np.ndarray,
    b: np.ndarray,
    rank: int,
    folder: Path,
) -> None:
    num_inputs = share.tensor_shape[1 - share.axis]
    wanted = (rank, num_inputs), (share.total, rank)
    if (a.shape, b.shape) != wanted:
        given, names = (a.shape, b.shape), _names(share.tensor)
        raise InputError(f"{folder / WEIGHTS}: {names[0]} and {names[1]}", given, str(wanted))


def _letter_sizes(share: Share, axis: int) -> list[int]:
    return [share.sizes[letter] for letter in share.groups[axis]]


def _a_of(share: Share, a: np.ndarray) -> np.ndarray:
    """[inputs, r] of A [r, in]."""
    return a.T.reshape(*_letter_sizes(share, 1 - share.axis), len(a))


def _b_of(share: Share, b: np.ndarray) -> np.ndarray:
    """[r, outputs] of B [out, r], of which it takes the rows of the share."""
    rows = share.outputs(b)
    return np.moveaxis(rows.reshape(*_letter_sizes(share, share.axis), -1), -1, 0)


def _stacked(
    shares: list[Share],
    leaves: dict[str, Any],
    rank: int,
    own_rank: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in] and B [out, rank] of a module."""
    first = shares[0]
    a = np.zeros((rank, first.tensor_shape[1 - first.axis]), np.float32)
    b = np.zeros((first.total, rank), np.float32)
    for number, share in enumerate(shares):
        place = slice(number * own_rank, (number + 1) * own_rank)
        own_a, own_b = (
            np.asarray(leaves[f"{share.leaf}{ADAPTER}/{part}"][share.index], np.float32)
            for part in "ab"
        )
        a[place] = own_a.reshape(-1, own_rank).T
        rows = share.outputs(b)
        rows[..., place] = np.moveaxis(own_b, 0, -1).reshape(*rows.shape[:-1], own_rank)
    return a, b


def _check_whole(
    leaves: dict[str, np.ndarray],
    config: ModelConfig,
    folder: Path,
) -> None:
    """Raises InputError unless every layer has the adapters that one has."""
    wanted = {path for path in tree.flatten(parameter_table(config)) if f"{ADAPTER}/" in path}
    missing = wanted - leaves.keys()
    missing |= {path for path, leaf in leaves.items() if np.isnan(leaf).any()}
    if missing:
        expected = f"adapters in every layer; some have none for {min(missing)}"
        raise InputError(str(folder / WEIGHTS), None, expected)
