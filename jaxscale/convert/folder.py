"""A model as a folder of Hugging Face: config.json and safetensors, read and written."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.safetensors import SafetensorsSource, write_safetensors
from jaxscale.checkpoint.source import LazyArray
from jaxscale.convert.families import BY_MODEL_TYPE, FAMILIES, bert
from jaxscale.convert.family import Family
from jaxscale.convert.fields import IGNORED, Fields, read_json
from jaxscale.convert.packed import import_packed, is_packed, packed_tensors
from jaxscale.convert.places import SCORE
from jaxscale.convert.quantised import FIELD as QUANTISATION
from jaxscale.convert.quantised import whole_leaves
from jaxscale.convert.weights import export_tensors, import_params
from jaxscale.models.config import ModelConfig
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.quantised import is_quantised
from jaxscale.types import InputError, Params, one_of

CONFIG = "config.json"
MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that has been opened: its configuration is read, its weights are not.

    Args:
        path: of the folder.
        values: config.json, but for how weights are quantised.
        family: of its `model_type`.
        config: the model.
        leaves: the weights by name; quantised ones are whole.
    """

    path: Path
    values: dict[str, Any]
    family: Family
    config: ModelConfig
    leaves: Mapping[str, LazyArray]

    @property
    def dtype(self) -> np.dtype:
        """The widest type of a weight."""
        dtypes = {leaf.dtype for leaf in self.leaves.values()}
        return max(dtypes, key=lambda dtype: dtype.itemsize)

    def params(self, stored: Params) -> Params:
        """The parameters, placed and cast as `stored` says; see `convert.weights.import_params`."""
        return import_params(
            self.config,
            self.family.layout,
            self.leaves,
            stored=stored,
            where=str(self.path),
        )

    @property
    def is_packed(self) -> bool:
        """Whether matrices have integers that can be kept as they are."""
        return any(is_packed(leaf) for leaf in self.leaves.values())

    def packed_params(self, stored: Params) -> Params:
        """As `params`; matrices keep the integers that they have in the folder."""
        return import_packed(
            self.config,
            self.family.layout,
            self.leaves,
            stored=stored,
            where=str(self.path),
        )


def open_folder(directory: str | Path) -> Folder:
    """Reads a folder's config.json and the headers of its weights.

    Raises:
        InputError: a file is missing or damaged, or config.json has an unknown architecture or a
            field that is missing, unknown or contradicts another; it names the file and the field.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise InputError("source", str(path), "a folder of Hugging Face")
    values, where = read_json(path / CONFIG), str(path / CONFIG)
    leaves: dict[str, LazyArray] = {}
    for name, leaf in SafetensorsSource(path).leaves().items():
        if _renamed(name) in leaves:
            raise InputError(f"{path}: {name}", leaf.shape, f"one tensor {_renamed(name)}")
        leaves[_renamed(name)] = leaf
    if QUANTISATION in values:
        leaves = whole_leaves(leaves, values.pop(QUANTISATION), where)
    family = _family(values, path / CONFIG)
    config = read_config(family, values, where, leaves.keys())
    return Folder(path, values, family, config, leaves)


def _renamed(tensor: str) -> str:
    """Today's name of a tensor: the files of the first BERTs have TensorFlow's for their norms."""
    for before, now in (
        ("LayerNorm.gamma", "LayerNorm.weight"),
        ("LayerNorm.beta", "LayerNorm.bias"),
    ):
        if tensor.endswith(before):
            return tensor.removesuffix(before) + now
    return tensor


def read_config(
    family: Family,
    values: dict[str, Any],
    where: str,
    names: Any,
) -> ModelConfig:
    """The model of a config.json; Raises as `open_folder`.

    Args:
        family: of its `model_type`.
        values: of the file.
        where: the file, for messages.
        names: of the weights, which say what a file may leave out.
    """
    fields = Fields(values, where, IGNORED)
    config = family.read(fields, names)
    fields.finish()
    has_score = family.has_score and f"{SCORE}.weight" in names
    return dataclasses.replace(config, use_value_head=True) if has_score else config


def write_folder(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    dtype: np.dtype,
    family: str | None = None,
    like: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and the weights, so that Hugging Face loads them.

    Args:
        directory: a folder without a config.json; made if need be.
        config: the model.
        params: its parameters, in the canonical order of the layers; those in few bits are written
            as they are, by compressed-tensors' "pack-quantized" format.
        dtype: of the weights.
        family: `model_type` to write; None for the first that has all that the model has.
        like: a config.json of the same model, which is kept with all its fields.
        max_shard_bytes: largest file of weights.
    Raises:
        InputError: no family, or not the one asked for, has all that the model has; or the folder
            has a model already.
    """
    path = Path(directory).expanduser()
    if (path / CONFIG).exists():
        raise InputError("directory", str(path), f"a folder without a {CONFIG}")
    chosen, values = _values(config, family, like)
    values = values | {"dtype": np.dtype(dtype).name, "torch_dtype": np.dtype(dtype).name}
    if config.use_value_head:
        values |= _of_score(chosen)
    if any(map(is_quantised, jax.tree.leaves(params, is_leaf=is_quantised))):
        tensors, values[QUANTISATION] = packed_tensors(config, chosen.layout, params, dtype=dtype)
    else:
        tensors = export_tensors(config, chosen.layout, params, dtype=dtype)
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, max_shard_bytes=max_shard_bytes)
    # Last, so that a folder with it is whole.
    (path / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def family_of(config: ModelConfig, kept: Path) -> Family:
    """The family of a model: that of the config.json in `kept`, or else the first that has it."""
    return _values(config, None, kept / CONFIG)[0]


def _family(values: dict[str, Any], file: Path) -> Family:
    kind = values.get("model_type")
    if kind not in BY_MODEL_TYPE:
        raise InputError(f"{file}: model_type", kind, one_of(str(kind), BY_MODEL_TYPE))
    return BY_MODEL_TYPE[kind]


def _values(
    config: ModelConfig,
    model_type: str | None,
    like: Path | None,
) -> tuple[Family, dict[str, Any]]:
    """The family of an export, and its config.json."""
    if like is not None and like.exists():
        values = read_json(like)
        values.pop(QUANTISATION, None)  # what is written are whole matrices
        family = _family(values, like)
        if model_type in (None, *family.model_types) and not _differences(family, values, config):
            # What is written beside it is in the form of transformers 4, which 5 reads too, but
            # which has no place for all that a file may say.
            values.pop("rope_parameters", None)
            kept = values | family.write(config)
            if not _differences(family, kept, config):
                return family, kept
    if model_type is not None and model_type not in BY_MODEL_TYPE:
        raise InputError("family", model_type, one_of(model_type, BY_MODEL_TYPE))
    families = FAMILIES if model_type is None else (BY_MODEL_TYPE[model_type],)
    for family in families:
        values = _written(family, config)
        differences = _differences(family, values, config)
        if not differences:
            return family, values
    if len(families) == 1:
        expected = f"a family that has {', '.join(differences)}"
        raise InputError("family", model_type, expected)
    expected = f"one of {', '.join(sorted(BY_MODEL_TYPE))}; none of them has all that it has"
    raise InputError("family", "the model", expected)


def _written(family: Family, config: ModelConfig) -> dict[str, Any]:
    about = {"model_type": family.model_types[0], "architectures": [family.architecture]}
    return about | family.write(config)


def _of_score(family: Family) -> dict[str, Any]:
    """What a config.json says of a model with one score."""
    stem = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    label = "LABEL_0"
    return {
        "architectures": [f"{stem}ForSequenceClassification"],
        "id2label": {"0": label},
        "label2id": {label: 0},
    }


def _differences(family: Family, values: dict[str, Any], config: ModelConfig) -> list[str]:
    """What a reader of a config.json would not find of the model, as `name = value`."""
    try:
        read = read_config(family, values, CONFIG, _telling(config))
    except InputError as error:
        return [str(error)]
    wanted, found = (_flat(each) for each in (config, read))
    names = dict.fromkeys([*wanted, *found])
    differing = [name for name in names if wanted.get(name) != found.get(name)]
    return [f"{name} = {wanted.get(name)}" for name in differing]


def _telling(config: ModelConfig) -> list[str]:
    """Names of tensors by which a reader knows parts of a model of which config.json is silent."""
    parts = {
        "lm_head.weight": not (config.is_tied or config.use_value_head),
        f"{SCORE}.weight": config.use_value_head,
        bert.POOLER: config.use_pooler,
        bert.PAIR: config.use_pair_head,
    }
    return [name for name, is_there in parts.items() if is_there]


def _flat(config: ModelConfig) -> dict[str, Any]:
    """What a model computes, layer by layer, so that equal layers in other patterns are equal."""
    by_layer = dataclasses.replace(config, pattern=config.layers, prefix=())
    facts = checkpoint_facts(by_layer)["fingerprint"]
    return tree.flatten(facts | {"max_length": config.max_length})
