"""`--set NAME.FIELD=VALUE`: where the path of an override leads, and what it binds there."""

import dataclasses
import re
from collections.abc import Callable
from inspect import isfunction
from typing import Any, NamedTuple

from jaxscale import renamed
from jaxscale.bindings import Binding, Bindings, check_parameter
from jaxscale.signatures import (
    EMPTY,
    dataclasses_in,
    default_of,
    full_name,
    has_parameter,
    hints,
    parameters,
)
from jaxscale.types import InputError, one_of
from jaxscale.written import (
    Fields,
    Reference,
    Scopes,
    UnwritableError,
    as_written,
    default_scopes,
    literal_or_text,
    text_of,
)

RUN = "run"  # the parameter of a verb whose fields an override names without it
NAME = r"[^\W\d]\w*"
KEY = re.compile(rf"(?:{NAME}/)*{NAME}(?:\.(?:{NAME}|\d+))*")
STEP = re.compile(rf"({NAME})((?:\.\d+)*)")


class _Step(NamedTuple):
    """One parameter on a path, and the item of it that the path goes on from: `pattern.0`."""

    name: str
    indices: tuple[int | str, ...]


class _Place(NamedTuple):
    """What a path has led to: the next name is a parameter of `target`, built in `scopes`."""

    target: Callable
    scopes: Scopes


def override(bindings: Bindings, function: Callable, text: str) -> None:
    """Binds what one `--set` argument says.

    Args:
        bindings: what the files bind, and earlier overrides.
        function: the verb, whose parameters or whose run's fields are the first names.
        text: `FIELD=VALUE` for a parameter of the verb or a field of its run; `NAME.FIELD=VALUE`
            for a field of the configuration NAME, and so on inwards, where a number selects an item
            of a tuple and a key one of a dict; `SCOPE/NAME.FIELD=VALUE` to bind in that scope;
            `MACRO=VALUE` for a macro that the files define. VALUE is a Python literal, or else a
            plain string.
    Raises:
        InputError: no such name, or a value on the path has no fields or no such item.
    """
    location = f"--set {text}"
    key, binding = _parsed(text, location)
    if key in bindings.macros:
        bindings.define(key, binding)
        return
    *scopes, path = key.split("/")
    *steps, last = _steps(bindings, function, path, location)
    place = _Place(function, tuple(scopes))
    while steps:
        step = _with_key(bindings, place, steps)
        place = _enter(bindings, place, step, location)
    if place.scopes[: len(scopes)] != tuple(scopes):
        place = _Place(place.target, tuple(scopes))
    _bind(bindings, place, last, binding)


def _parsed(text: str, location: str) -> tuple[str, Binding]:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not KEY.fullmatch(key):
        raise InputError("--set", text, "NAME.FIELD=VALUE or FIELD=VALUE")
    if value.startswith(("@", "%")):
        expected = "a Python literal or plain text; references belong in a gin file"
        raise InputError(f"--set {key}", value, expected)
    return key, Binding(literal_or_text(value), location)


def _steps(bindings: Bindings, function: Callable, path: str, location: str) -> list[_Step]:
    """The parameters on a path, with `run` before a first name that is a field of the run."""
    steps = []
    for name, items in STEP.findall(path):
        indices = tuple(map(int, items.split(".")[1:]))
        steps.append(_Step(name, indices))
    first = steps[0].name
    if has_parameter(function, first):
        return steps
    known = [*parameters(function), *bindings.macros]
    for run in dataclasses_in(hints(function).get(RUN)):
        if has_parameter(run, first):
            return [_Step(RUN, ()), *steps]
        known += parameters(run)
    expected = renamed.new_path(first) or one_of(first, known)
    raise InputError(f"{location}: {first}", first, expected)


def _with_key(bindings: Bindings, place: _Place, steps: list[_Step]) -> _Step:
    """Takes the first step, with the next one where the first leads to a dict, as its key."""
    step = steps.pop(0)
    if not steps or step.indices or not has_parameter(place.target, step.name):
        return step
    value, _ = _current(bindings, place, step.name)
    if not isinstance(value, dict):
        return step
    key = steps.pop(0)
    return _Step(step.name, (key.name, *key.indices))


def _enter(bindings: Bindings, place: _Place, step: _Step, location: str) -> _Place:
    """What is built for one parameter, or for one item of it; binds what was only implied."""
    target, scopes = place
    label = f"{location}: {_joined(step, '.')}"
    check_parameter(target, step.name, location)
    value, fields = _current(bindings, place, step.name)
    item = _item(value, step.indices, label)
    reference = _configuration(item, place, step, label)
    value = _with_item(value, step.indices, reference)
    _rebind(bindings, place, step.name, Binding(value, location), fields)
    entered = reference.within(scopes)
    return _Place(entered.target, entered.scopes)


def _configuration(item: Any, place: _Place, step: _Step, label: str) -> Reference:
    """The reference to enter for a value on the path: its own, or one for a value of None."""
    target, scopes = place
    own = default_scopes(scopes, target, _joined(step, "_"))
    kinds = dataclasses_in(hints(target).get(step.name))
    is_built = isinstance(item, Reference) or dataclasses.is_dataclass(item)
    if len(kinds) == 1 and not is_built:
        return Reference(kinds[0], own, is_called=True)
    if not isinstance(item, Reference) or not (item.is_called or isfunction(item.target)):
        expected = "a configuration that has fields"
        if len(kinds) > 1:
            choices = " or ".join(f"@{full_name(kind)}()" for kind in kinds)
            expected += f"; bind {choices} in a gin file"
        raise InputError(label, text_of(item), expected)
    if not step.indices or item.scopes[-2:] == own[-2:]:
        return item
    # Other items may be built in the same scopes, so this one gets scopes inside them.
    own = default_scopes((*item.scopes, *scopes), target, _joined(step, "_"))
    return dataclasses.replace(item, scopes=own)


def _bind(bindings: Bindings, place: _Place, step: _Step, binding: Binding) -> None:
    """Binds the parameter at the end of a path, or changes one item of it."""
    check_parameter(place.target, step.name, binding.location)
    if not step.indices:
        bindings.bind(place.scopes, place.target, step.name, binding)
        return
    label = f"{binding.location}: {_joined(step, '.')}"
    value, fields = _current(bindings, place, step.name)
    _item(value, step.indices, label)  # that there is one
    value = _with_item(value, step.indices, binding.value)
    _rebind(bindings, place, step.name, Binding(value, binding.location), fields)


def _rebind(
    bindings: Bindings,
    place: _Place,
    name: str,
    binding: Binding,
    fields: Fields,
) -> None:
    """Binds a value and the fields that it needs, unless it is bound already."""
    bound = bindings.of(*place).get(name)
    if not bound or bound.value != binding.value:
        bindings.bind(place.scopes, place.target, name, binding)
    for (scopes, target), values in fields.items():
        for field, value in values.items():
            bindings.bind(scopes, target, field, Binding(value, binding.location))


def _current(bindings: Bindings, place: _Place, name: str) -> tuple[Any, Fields]:
    """The value of a parameter before the override, as written, and the bindings it needs."""
    target, scopes = place
    if bound := bindings.of(target, scopes).get(name):
        return bindings.expand(bound.value, f"{bound.location}: {name}"), {}
    implied = bindings.implied(target, scopes, name)
    default = default_of(target, name)
    own = default_scopes(scopes, target, name)
    if default is EMPTY:
        return implied, {}
    if implied:
        # In scopes inside the present ones the same is built, and an override reaches only this.
        return dataclasses.replace(implied, scopes=own), {}
    try:
        return as_written(default, own)
    except UnwritableError:
        return default, {}


def _item(value: Any, indices: tuple[int | str, ...], label: str) -> Any:
    """The item that the indices lead to; without any, the value itself."""
    for index in indices:
        if isinstance(value, dict):
            if index not in value:
                raise InputError(label, index, one_of(str(index), map(str, value)))
        elif not isinstance(value, (list, tuple)):
            expected = "a tuple, from which a number selects an item"
            raise InputError(label, text_of(value), expected)
        elif index >= len(value):
            raise InputError(label, index, f"a number below {len(value)}, the number of items")
        value = value[index]
    return value


def _with_item(value: Any, indices: tuple[int | str, ...], item: Any) -> Any:
    """A value with another item where the indices lead."""
    if not indices:
        return item
    index, *inner = indices
    items = dict(value) if isinstance(value, dict) else list(value)
    items[index] = _with_item(items[index], tuple(inner), item)
    return type(value)(items)


def _joined(step: _Step, separator: str) -> str:
    return separator.join([step.name, *map(str, step.indices)])
