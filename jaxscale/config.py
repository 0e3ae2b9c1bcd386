"""Loads gin files and overrides for one function: the only module that knows gin.

gin's parser reads the files; jaxscale.bindings, not gin's registry, binds what they say. So classes
and functions stay undecorated, no state outlives a call, every value remembers its file and line,
and a mistake raises InputError.

What a file may hold is a subset of gin, so that gin itself parses it too:

- `from __gin__ import dynamic_registration`, first in every file that binds something;
- `import a.b.c`, `from a.b import c`, each also with `as d`: modules only;
- `include 'other.gin'`, relative to this file; the last binding of a name wins;
  `jaxscale/configs/...` is a file that comes with the package, here and for `read`;
- `c.Class.field = value`, where a value is a Python literal, `@c.Class()`, `@c.function`,
  `@scope/c.Class()`, `%MACRO`, or a list, tuple or dict of these;
- `scope/c.Class.field = value`, used where c.Class is built in that scope;
- `MACRO = value`, and `%gin.REQUIRED` for a value that a later file or --set must give.

A file is code: what it names is called. With `admitted` it may name only what jaxscale and the
modules that the user names define.

A field that takes one dataclass is built from the bindings of that class without being bound:
always if it has no default, otherwise if something is bound for the class in the scope at hand.
"""

import contextlib
import contextvars
import dataclasses
import importlib
import tokenize
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from jaxscale import renamed
from jaxscale.bindings import Binding, Bindings, Builder
from jaxscale.overrides import override
from jaxscale.signatures import full_name
from jaxscale.types import InputError, closest, one_of
from jaxscale.written import Macro, Reference, render

OURS = ("jaxscale", "configs")
DYNAMIC_REGISTRATION = "__gin__.dynamic_registration"

_operative_config = contextvars.ContextVar("operative_config", default="")


def run(
    function: Callable,
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    admitted: Sequence[str] | None = None,
) -> Any:
    """Calls `function` with the arguments that gin files and overrides give it.

    Args:
        function: keyword-only function, the verb.
        files: gin files; later ones override earlier ones.
        overrides: `NAME.FIELD=VALUE`, `FIELD=VALUE` or `MACRO=VALUE`, see `overrides.override`.
        admitted: modules and packages beside jaxscale whose functions the files may name, for files
            of somebody else; None admits all.
    Returns:
        What the function returns.
    Raises:
        InputError: a name, type or file is wrong, or a required value is missing.
    """
    loaded = load(function, files, overrides, admitted)
    token = _operative_config.set(loaded.text)
    try:
        return function(**loaded.arguments)
    finally:
        _operative_config.reset(token)


def operative_config() -> str:
    """The configuration in use, as a gin file that repeats the call; empty outside `run`."""
    return _operative_config.get()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The arguments for one call, and the gin text that gives the same arguments again."""

    arguments: dict[str, Any]
    text: str


def load(
    function: Callable,
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    admitted: Sequence[str] | None = None,
) -> Loaded:
    """Builds the arguments of `function` without calling it; Args and Raises as in `run`."""
    bindings = read(files, admitted)
    for text in overrides:
        override(bindings, function, text)
    bindings.check_scopes()
    builder = Builder(bindings)
    arguments = builder.arguments(function, ())
    bindings.check_used(function)
    return Loaded(arguments, render(builder.used))


def read(files: Sequence[str | Path], admitted: Sequence[str] | None = None) -> Bindings:
    """All that the files bind, every name resolved and nothing built; Raises as in `run`."""
    bindings = Bindings()
    for file in files:
        _read(_place(Path(), file), bindings, admitted)
    return bindings


def _place(folder: Path, name: str | Path) -> Path:
    """Where a file is that is named relative to a folder, or as one of the package's own."""
    is_ours = Path(name).parts[:2] == OURS
    return (Path(__file__).parents[1] if is_ours else folder) / name


class _Delegate(config_parser.ParserDelegate):
    """Turns `@...` and `%...` into our values; `resolve` finds what a selector names."""

    def __init__(self, resolve: Callable[[str], Callable]):
        self.resolve = resolve

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Reference:
        *scopes, selector = scoped_selector.split("/")
        return Reference(self.resolve(selector), tuple(scopes), evaluate)

    def macro(self, name: str) -> Macro:
        return Macro(name)


class _Names:
    """The modules that one file imports, and the objects in them."""

    def __init__(self, admitted: Sequence[str] | None):
        self.admitted = admitted
        self.modules: dict[str, types.ModuleType] = {}
        self.is_dynamic = False

    def add(self, statement: config_parser.ImportStatement) -> None:
        """Imports a module for the statements that follow in the file."""
        name = statement.module
        if name == DYNAMIC_REGISTRATION:
            self.is_dynamic = True
            return
        self._check_admitted(name, _where(statement))
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # a dependency of the module is missing, not the module
            expected = renamed.new_object(name) or "an importable module"
            raise InputError(f"{_where(statement)}: import", name, expected) from None
        if not (statement.is_from or statement.alias):
            # As in Python, `import a.b` makes `a` known.
            module = importlib.import_module(name.split(".")[0])
        self.modules[statement.bound_name()] = module

    def resolve(self, selector: str, location: str) -> Callable:
        """The function or class that a selector such as `config.ModelConfig` names."""
        if not self.is_dynamic:
            expected = "`from __gin__ import dynamic_registration` as the file's first line"
            raise InputError(location, selector, expected)
        label = f"{location}: {selector}"
        first, *rest = selector.split(".")
        if first not in self.modules:
            known = one_of(first, self.modules) if self.modules else "it imports none"
            raise InputError(label, first, f"a module that this file imports: {known}")
        found = self.modules[first]
        given_name = ".".join([found.__name__, *rest])
        new_name = renamed.new_object(given_name)
        for name in rest:
            if not hasattr(found, name):
                public = [each for each in vars(found) if not each.startswith("_")]
                raise InputError(label, name, new_name or one_of(name, public))
            found = getattr(found, name)
        if not callable(found):
            raise InputError(label, found, "a function or a class")
        # A module of ours has others as attributes, with all that they can do.
        self._check_admitted(found.__module__, location)
        if new_name and full_name(found) != given_name:
            # The old module may import the class from the new one.
            raise InputError(label, name, new_name)
        return found

    def _check_admitted(self, module: str, location: str) -> None:
        """Raises InputError for a module that a file of somebody else may not name."""
        if self.admitted is None:
            return
        roots = ("jaxscale", *self.admitted)
        if not any(f"{module}.".startswith(f"{root}.") for root in roots):
            expected = (
                f"something that {' or '.join(roots)} defines, for a file can call whatever it "
                f"names; `--admit {module}` admits it"
            )
            raise InputError(location, module, expected)


def _read(
    path: Path,
    bindings: Bindings,
    admitted: Sequence[str] | None,
    including: tuple[Path, ...] = (),
    label: str = "FILE.gin",
) -> None:
    """Adds what a file and its includes bind; `label` names the file in an error."""
    if path.resolve() in including:
        raise InputError(label, str(path), "a file that does not include itself")
    names = _Names(admitted)
    for statement in _statements(path, names, label):
        location = _where(statement)
        match statement:
            case config_parser.ImportStatement():
                names.add(statement)
            case config_parser.IncludeStatement():
                included = _place(path.parent, statement.filename)
                outer = (*including, path.resolve())
                _read(included, bindings, admitted, outer, f"{location}: include")
            case config_parser.BlockDeclaration():
                names.resolve(statement.selector, location)
            case _:
                _bind(statement, names, bindings, location)


def _bind(statement: Any, names: _Names, bindings: Bindings, location: str) -> None:
    """Adds what one statement binds, a parameter or a macro."""
    binding = Binding(statement.value, location)
    scopes = [scope for scope in statement.scope.split("/") if scope]
    if statement.arg_name:
        target = names.resolve(statement.selector, location)
        bindings.bind(tuple(scopes), target, statement.arg_name, binding)
    else:
        bindings.define("/".join([*scopes, statement.selector]), binding)


def _statements(path: Path, names: _Names, label: str) -> Iterator[Any]:
    """gin's statements in a file, in order; what cannot be opened or parsed raises InputError."""
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        kind = "folder" if path.is_dir() else "pipe or device"
        raise InputError(label, str(path), f"a gin file; this is a {kind}")
    if not path.is_file():
        siblings = [other.name for other in path.parent.glob("*.gin")]
        kind = "an existing gin file" if path.suffix else "an existing gin file or run's directory"
        expected = f"{kind}{closest(path.name, siblings)}"
        raise InputError(label, str(path), expected)

    def resolve(selector: str) -> Callable:
        return names.resolve(selector, f"{path}:{parser.current_token.start[0]}")

    with path.open(encoding="utf-8-sig") as stream, _syntax_errors(path):
        parser = config_parser.ConfigParser(stream, _Delegate(resolve))
        yield from parser


@contextlib.contextmanager
def _syntax_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise InputError(f"{path}:{error.lineno}", line, f"gin syntax ({error.msg})") from None
    except tokenize.TokenError as error:
        message, (line_number, _) = error.args
        label = f"{path}:{line_number}"
        raise InputError(label, "the end of the file", f"gin syntax ({message})") from None
    except UnicodeDecodeError as error:
        raise InputError(str(path), error.reason, "UTF-8 text") from None


def _where(statement: Any) -> str:
    return f"{statement.location.filename}:{statement.location.line_num}"
