"""A pickle read as plain data: its opcodes are followed, and nothing that it names is ever called.

Python's own reader calls whatever a file names. Here a class or function that the reader of a
format does not know becomes a `Named`, which only says what the file says.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from jaxscale.types import InputError

Build = Callable[..., Any]
MARK = object()
# These push the argument that pickletools has parsed.
VALUES = {
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "BININT",
    "BININT1",
    "BININT2",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
FROM_MARK: Mapping[str, Callable[[list], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": lambda items: dict(zip(_keys(items[::2]), items[1::2])),
    "FROZENSET": lambda items: frozenset(_keys(items)),
}
MAX_KEY_DEPTH, MAX_KEY_PARTS = 8, 1000
IGNORED = {"PROTO", "FRAME", "STOP"}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
GETS = {"GET", "BINGET", "LONG_BINGET"}


@dataclasses.dataclass(eq=False)
class Named:
    """A class or function that a pickle names, or an object made of one; never the thing itself.

    Args:
        name: module and name, such as "torch.Size".
        arguments: what the object would be made of; None for the class or function alone.
        state: what it would be given after that.
    """

    name: str
    arguments: tuple | None = None
    state: Any = None


def read_pickle(
    data: bytes,
    where: str,
    *,
    builders: Mapping[str, Build],
    persistent: Build | None = None,
) -> Any:
    """The object in a pickle, of dicts, lists, tuples, sets, numbers, text and `Named`.

    Args:
        data: the pickle.
        where: its file, for messages.
        builders: functions of ours in place of what the file names, by that name.
        persistent: makes a value of what the file keeps elsewhere, such as a storage.
    Raises:
        InputError: it is damaged, or has an opcode that no such file needs.
    """
    machine = _Machine(builders, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.result()
    except InputError as error:
        raise InputError(where, error.parameter, str(error)) from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(where, type(error).__name__, f"a sound pickle ({error})") from error


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self, builders: Mapping[str, Build], persistent: Build | None):
        self._builders = builders
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follows one opcode."""
        stack = self._stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name in FROM_MARK:
            stack.append(FROM_MARK[name](self._to_mark()))
        elif name in PUTS:
            self._memo[argument] = stack[-1]
        elif name in GETS:
            stack.append(self._memo[argument])
        elif name not in IGNORED:
            self._step_of_its_own(name, argument)

    def result(self) -> Any:
        """What is left when the pickle ends."""
        (value,) = self._stack
        return value

    def _step_of_its_own(self, name: str, argument: Any) -> None:
        step = getattr(self, f"_{name.lower()}", None)
        if step is None:
            raise InputError("pickle", name, "an opcode of plain data")
        step(argument)

    def _to_mark(self) -> list[Any]:
        """Takes what lies above the last mark, and the mark, off the stack."""
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def _mark(self, _: None) -> None:
        self._stack.append(MARK)

    def _pop(self, _: None) -> None:
        self._stack.pop()

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _append(self, _: None) -> None:
        item = self._stack.pop()
        self._stack[-1].append(item)

    def _appends(self, _: None) -> None:
        items = self._to_mark()
        self._stack[-1].extend(items)

    def _additems(self, _: None) -> None:
        items = self._to_mark()
        self._stack[-1].update(_keys(items))

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        (key,) = _keys([key])
        self._stack[-1][key] = value

    def _setitems(self, _: None) -> None:
        items = self._to_mark()
        self._stack[-1].update(zip(_keys(items[::2]), items[1::2]))

    def _global(self, argument: str) -> None:
        self._stack.append(Named(argument.replace(" ", ".")))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(Named(f"{module}.{name}"))

    def _reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._made(function, arguments))

    def _newobj(self, _: None) -> None:
        self._reduce(None)

    def _newobj_ex(self, _: None) -> None:
        self._stack.pop()  # arguments by keyword
        self._reduce(None)

    def _build(self, _: None) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Named):
            self._stack[-1].state = state

    def _binpersid(self, _: None) -> None:
        key = self._stack.pop()
        if self._persistent is None:
            raise InputError("pickle", "BINPERSID", "data that is all in the pickle")
        self._stack.append(self._persistent(key))

    def _made(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise ValueError("an object that is made of no class")
        if function.name in self._builders:
            return self._builders[function.name](*arguments)
        return Named(function.name, arguments)


def _keys(values: list[Any]) -> list[Any]:
    """The values; raises ValueError where hashing one would overflow the stack, or never end."""
    for value in values:
        level, depth = [value], 0
        while nested := [each for each in level if isinstance(each, tuple | frozenset)]:
            level, depth = [part for each in nested for part in each], depth + 1
            if depth > MAX_KEY_DEPTH or len(level) > MAX_KEY_PARTS:
                raise ValueError("a key of too many parts")
    return values
