"""Loads gin files and overrides for one function: the only module that knows gin.

gin's parser reads the files; jaxscale.bindings, not gin's registry, binds what they say. So classes
and functions stay undecorated, no state outlives a call, every value remembers its file and line,
and a mistake raises InputError.

What a file may hold (a subset of gin, so that gin itself reads it too):
    from __gin__ import dynamic_registration      first, in every file that binds something import
    a.b.c; from a.b import c; ... as d     modules only include 'other.gin'
    relative to this file; the last binding of a name wins c.Class.field = value
    Python literals, @c.Class(), @c.function, @scope/c.Class(), %MACRO scope/c.Class.field = value
    used where c.Class is built in that scope MACRO = value                                 and
    %gin.REQUIRED for a value that a later file or --set must give
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

from jaxscale.bindings import Binding, Bindings, Builder, Macro, Reference, closest, one_of, render
from jaxscale.types import InputError

DYNAMIC_REGISTRATION = "__gin__.dynamic_registration"

_operative_config = contextvars.ContextVar("operative_config", default="")


def run(
    function: Callable,
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    bound_as: Callable | None = None,
) -> Any:
    """Calls `function` with the arguments that gin files and overrides give it; returns what it returns.

    Args:
        function: keyword-only function, the verb.
        files: gin files; later ones override earlier ones.
        overrides: `NAME.FIELD=VALUE`, `FIELD=VALUE` or `MACRO=VALUE`, see `Bindings.override`.
        bound_as: the function whose parameters the files bind, where `function` takes the arguments
            of another one.

    Raises:
        InputError: a name, type or file is wrong, or a required value is missing.
    """
    loaded = load(bound_as or function, files, overrides)
    token = _operative_config.set(loaded.text)
    try:
        return function(**loaded.arguments)
    finally:
        _operative_config.reset(token)


def operative_config() -> str:
    """The configuration of the run in progress as a gin file that repeats it; empty outside `run`."""
    return _operative_config.get()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The arguments for one call, and the gin text that gives the same arguments again."""

    arguments: dict[str, Any]
    text: str


def load(function: Callable, files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Loaded:
    """Builds the arguments of `function` without calling it; Args and Raises as in `run`."""
    bindings = read(files)
    for text in overrides:
        bindings.override(function, text)
    bindings.check_scopes()
    builder = Builder(bindings)
    arguments = builder.arguments(function, ())
    bindings.check_used(function)
    return Loaded(arguments, render(builder.used))


def read(files: Sequence[str | Path]) -> Bindings:
    """Everything that the files bind, every name resolved and nothing built; Raises as in `run`."""
    bindings = Bindings()
    for file in files:
        _read(Path(file), bindings)
    return bindings


class _Delegate(config_parser.ParserDelegate):
    """Turns `@...` and `%...` into values of ours; `resolve` finds the object that a selector names."""

    def __init__(self, resolve: Callable[[str], Callable]):
        self.resolve = resolve

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Reference:
        *scopes, selector = scoped_selector.split("/")
        return Reference(self.resolve(selector), tuple(scopes), evaluate)

    def macro(self, name: str) -> Macro:
        return Macro(name)


class _Names:
    """The modules that one file imports, and the objects in them."""

    def __init__(self):
        self.modules: dict[str, types.ModuleType] = {}
        self.is_dynamic = False

    def add(self, statement: config_parser.ImportStatement) -> None:
        """Imports a module for the statements that follow in the file."""
        if statement.module == DYNAMIC_REGISTRATION:
            self.is_dynamic = True
            return
        try:
            module = importlib.import_module(statement.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{statement.module}.".startswith(f"{error.name}."):
                raise  # a dependency of the module is missing, not the module
            raise InputError(
                f"{_where(statement)}: import", statement.module, "an importable module"
            ) from None
        if not (statement.is_from or statement.alias):  # `import a.b` binds a
            module = importlib.import_module(statement.module.split(".")[0])
        self.modules[statement.bound_name()] = module

    def resolve(self, selector: str, location: str) -> Callable:
        """The function or class that a selector such as `config.ModelConfig` names."""
        if not self.is_dynamic:
            raise InputError(
                location,
                selector,
                "`from __gin__ import dynamic_registration` as the file's first line",
            )
        first, *rest = selector.split(".")
        if first not in self.modules:
            known = one_of(first, self.modules) if self.modules else "it imports none"
            raise InputError(
                f"{location}: {selector}", first, f"a module that this file imports: {known}"
            )
        found = self.modules[first]
        for name in rest:
            if not hasattr(found, name):
                public = [each for each in vars(found) if not each.startswith("_")]
                raise InputError(f"{location}: {selector}", name, one_of(name, public))
            found = getattr(found, name)
        if not callable(found):
            raise InputError(f"{location}: {selector}", found, "a function or a class")
        return found


def _read(
    path: Path, bindings: Bindings, including: tuple[Path, ...] = (), label: str = "FILE.gin"
) -> None:
    """Adds what a file and its includes bind; `label` names the file in an error."""
    if path.resolve() in including:
        raise InputError(label, str(path), "a file that does not include itself")
    names = _Names()
    for statement in _statements(path, names, label):
        location = _where(statement)
        if isinstance(statement, config_parser.ImportStatement):
            names.add(statement)
        elif isinstance(statement, config_parser.IncludeStatement):
            _read(
                path.parent / statement.filename,
                bindings,
                (*including, path.resolve()),
                f"{location}: include",
            )
        elif isinstance(statement, config_parser.BlockDeclaration):
            names.resolve(statement.selector, location)
        elif statement.arg_name:
            target = names.resolve(statement.selector, location)
            scopes = tuple(filter(None, statement.scope.split("/")))
            bindings.bind(scopes, target, statement.arg_name, Binding(statement.value, location))
        else:
            name = "/".join(filter(None, [statement.scope, statement.selector]))
            bindings.define(name, Binding(statement.value, location))


def _statements(path: Path, names: _Names, label: str) -> Iterator[Any]:
    """gin's statements in a file, in order; what cannot be opened or parsed raises InputError."""
    if path.is_dir():
        raise InputError(label, str(path), "a gin file; this is a folder")
    if not path.is_file():
        siblings = (
            [other.name for other in path.parent.glob("*.gin")] if path.parent.is_dir() else []
        )
        raise InputError(label, str(path), "an existing gin file" + closest(path.name, siblings))
    with path.open(encoding="utf-8") as stream, _syntax_errors(path):
        delegate = _Delegate(
            lambda selector: names.resolve(selector, f"{path}:{parser.current_token.start[0]}")
        )
        parser = config_parser.ConfigParser(stream, delegate)
        yield from parser


@contextlib.contextmanager
def _syntax_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SyntaxError as error:
        raise InputError(
            f"{path}:{error.lineno}", (error.text or "").strip(), f"gin syntax ({error.msg})"
        ) from None
    except tokenize.TokenError as error:
        raise InputError(
            f"{path}:{error.args[1][0]}", "the end of the file", f"gin syntax ({error.args[0]})"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(str(path), error.reason, "UTF-8 text") from None


def _where(statement: Any) -> str:
    return f"{statement.location.filename}:{statement.location.line_num}"
