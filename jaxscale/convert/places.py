"""Where each parameter lies in the tensors of a family: one plan, which import and export follow.

A family names a module of Hugging Face for each of our parameters. Parameters that name the same
module are fused in it, one after the other along its outputs, in the order of the names.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import Parameter, in_order_of_use, parameter_table
from jaxscale.types import Role

# A module, or several of which a folder has one: experts one by one or packed.
Names = Mapping[str, str | tuple[str, ...]]
EXPERT = "{expert}"
SCORE = "score"  # module of the value head, which transformers gives this name in every family
TABLES = (Role.EMBEDDING, Role.POSITIONS, Role.UNEMBEDDING, Role.VALUE)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a family lays out its tensors.

    Args:
        names: module by the path of our parameter; paths in a layer begin with "attention", "ffn"
            or "moe", and their modules' names with `layer`.
        layer: beginning of the names of a layer's modules, with "{layer}" for its number.
        is_input_first: whether matrices are [in, out] (GPT-2) instead of [out, in].
        interleaved: modules that are fused in turns, with the letter of the dim that counts the
            turns: each has the parts of one kv head, or of one hidden element (Phi-3-small).
        num_unread_positions: rows of a learned position table before that of position 0 (OPT).
    """

    names: Names
    layer: str = "model.layers.{layer}."
    is_input_first: bool = False
    interleaved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_unread_positions: int = 0

    @property
    def modules(self) -> Names:
        """All names, also that of a value head."""
        return {**self.names, "value_head": SCORE}


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of one of our leaves that is a part of one tensor.

    Args:
        leaf: path of the leaf.
        parameter: what our table says of it.
        row: of a stacked leaf; None for one that is not stacked.
        expert: of a leaf of experts; None for all of them.
        tensor: name of the tensor.
        groups: our dim letters along each axis of the tensor.
        axis: axis of the tensor along which it may be fused.
        start: where the share begins along `axis`.
        total: size of the tensor along `axis`.
        num_turns: in how many turns the shares of the tensor lie along `axis`.
    """

    leaf: str
    parameter: Parameter
    row: int | None
    expert: int | None
    tensor: str
    groups: tuple[str, ...]
    axis: int
    start: int
    total: int
    num_turns: int = 1

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        shape = self._shape()
        shape[self.axis] = self.total
        return tuple(shape)

    @property
    def index(self) -> tuple[int | slice, ...]:
        """The box of the leaf."""
        row = () if self.row is None else (self.row,)
        return row if self.expert is None else (*row, self.expert)

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The box of the leaf, out of the tensor's values."""
        part = tensor.reshape(self._turns())[self._part()].reshape(self._letter_sizes())
        return part.transpose(self._order())

    def write(self, box: np.ndarray, tensor: np.ndarray) -> None:
        """Puts the box of the leaf into the tensor."""
        by_turn = tensor.reshape(self._turns())  # a view
        part = box.transpose(np.argsort(self._order()))
        by_turn[self._part()] = part.reshape(by_turn[self._part()].shape)

    def outputs(self, rows: np.ndarray) -> np.ndarray:
        """The view of the share's outputs in an array whose first dim is the tensor's `axis`."""
        by_turn = rows.reshape(self.num_turns, -1, *rows.shape[1:])
        return by_turn[:, self._part()[-1]]

    def _letters(self) -> str:
        letters = self.parameter.dims.removeprefix("L")
        return letters if self.expert is None else letters.removeprefix("E")

    @property
    def sizes(self) -> dict[str, int]:
        """By letter of the leaf's dims."""
        return dict(zip(self.parameter.dims, self.parameter.shape, strict=True))

    def _letter_sizes(self) -> list[int]:
        sizes = self.sizes
        return [sizes[letter] for letter in "".join(self.groups)]

    def _shape(self) -> list[int]:
        sizes = self.sizes
        return [math.prod(sizes[letter] for letter in group) for group in self.groups]

    def _turns(self) -> list[int]:
        """The tensor's shape with its turns apart."""
        shape = list(self.tensor_shape)
        shape[self.axis : self.axis + 1] = [self.num_turns, self.total // self.num_turns]
        return shape

    def _part(self) -> tuple[slice, ...]:
        """The box of the share in a tensor with its turns apart."""
        before = (slice(None),) * (self.axis + 1)
        end = self.start + self._shape()[self.axis]
        return (*before, slice(self.start // self.num_turns, end // self.num_turns))

    def _order(self) -> list[int]:
        """The axis of the tensor's letters for each of the leaf's."""
        written = "".join(self.groups)
        return [written.index(letter) for letter in self._letters()]


def plan(
    config: ModelConfig,
    layout: Layout,
    available: Collection[str] | None = None,
) -> dict[str, list[Share]]:
    """The shares of each tensor, in the order in which a forward uses them.

    Args:
        config: the model.
        layout: of the family.
        available: names of the tensors that there are, by which one of several names is chosen;
            None takes the first, that of transformers 4.
    """
    table = parameter_table(config)
    outside = {name: part for name, part in table.items() if name not in ("prefix", "layers")}
    shares = list(_section(outside, "", None, "", layout, available))
    for number in range(config.num_layers):
        shares += _layer(config, table, number, layout, available)
    tensors: dict[str, list[Share]] = {}
    for share in shares:
        tensors.setdefault(share.tensor, []).append(share)
    return {name: _fused(parts, layout) for name, parts in tensors.items()}


def _layer(
    config: ModelConfig,
    table: dict,
    number: int,
    layout: Layout,
    available: Collection[str] | None,
) -> Iterator[Share]:
    row, position = divmod(number - len(config.prefix), config.period)
    section, row = ("layers", row) if row >= 0 else ("prefix", None)
    name = str(position) if section == "layers" else str(number)
    begin = layout.layer.format(layer=number)
    path = f"{section}/{name}/"
    yield from _section(table[section][name], path, row, begin, layout, available)


def _section(
    table: dict,
    path: str,
    row: int | None,
    begin: str,
    layout: Layout,
    available: Collection[str] | None,
) -> Iterator[Share]:
    parameters = dict(in_order_of_use(table))
    order = list(layout.modules)
    for leaf in sorted(parameters, key=lambda leaf: order.index(_entry(leaf, layout.modules))):
        parameter = parameters[leaf]
        name = _tensor_name(leaf, begin, parameter, layout, available)
        experts: list[int | None] = [None]
        if EXPERT in name:
            experts = list(range(parameter.shape[parameter.dims.index("E")]))
        for expert in experts:
            groups = _groups(leaf, parameter, expert, layout)
            tensor = name.format(expert=expert)
            yield Share(path + leaf, parameter, row, expert, tensor, groups, 0, 0, 0)


def _entry(leaf: str, names: Names) -> str:
    """The entry of a family's names for a leaf: its own, or that of its matrix or norm."""
    if leaf in names:
        return leaf
    module, _, last = leaf.rpartition("/")
    return module if last in ("scale", "bias", "weights") else leaf.removesuffix("_bias")


def _tensor_name(
    leaf: str,
    begin: str,
    parameter: Parameter,
    layout: Layout,
    available: Collection[str] | None,
) -> str:
    modules = layout.modules[_entry(leaf, layout.modules)]
    modules = (modules,) if isinstance(modules, str) else modules
    is_bias = leaf.endswith(("/bias", "_bias"))
    names = []
    for module in modules:
        is_packed = parameter.role == Role.EXPERT and EXPERT not in module
        suffix = "" if is_packed else ".bias" if is_bias else ".weight"
        names.append(begin + module + suffix)
    for name in names:
        if available is not None and name.format(expert=0) in available:
            return name
    return names[0]


def _groups(
    leaf: str,
    parameter: Parameter,
    expert: int | None,
    layout: Layout,
) -> tuple[str, ...]:
    """Our dim letters along each axis of a tensor."""
    letters = parameter.dims.removeprefix("L")
    if parameter.role in TABLES:
        return tuple(letters)
    if parameter.role not in (Role.MATRIX, Role.EXPERT, Role.ROUTER):
        return (letters,)
    lead = ("E",) if parameter.role == Role.EXPERT and expert is None else ()
    if parameter.role == Role.EXPERT:
        letters = letters.removeprefix("E")
    # The output projection takes heads in, every other matrix one dim.
    num_inputs = 2 if leaf == "attention/o" else 1
    inputs, outputs = letters[:num_inputs], letters[num_inputs:]
    matrix = (inputs, outputs) if layout.is_input_first else (outputs, inputs)
    return (*lead, *matrix)


def _fused(shares: list[Share], layout: Layout) -> list[Share]:
    """The shares of one tensor, placed one after the other along its outputs."""
    num_axes = len(shares[0].groups)
    parameter = shares[0].parameter
    axis = 1 if num_axes == 3 else 0
    if layout.is_input_first and parameter.role == Role.MATRIX:
        axis = 1
    start = layout.num_unread_positions if parameter.role == Role.POSITIONS else 0
    placed = []
    for share in shares:
        share = dataclasses.replace(share, axis=axis, start=start)
        placed.append(share)
        start += share._shape()[axis]
    num_turns = _num_turns(shares, layout)
    return [dataclasses.replace(share, total=start, num_turns=num_turns) for share in placed]


def _num_turns(shares: list[Share], layout: Layout) -> int:
    for module, letter in layout.interleaved.items():
        if f".{module}." in shares[0].tensor:
            by_letter = [share.sizes[letter] for share in shares if letter in share.sizes]
            return by_letter[0]
    return 1
