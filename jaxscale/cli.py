"""The `jaxscale` command: each verb calls one function with what a gin file and `--set` give it."""

import argparse
import contextlib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import jaxscale
from jaxscale import config
from jaxscale.launch.plugins import shorten_errors
from jaxscale.launch.preemption import Preemption
from jaxscale.types import InputError, RunError
from jaxscale.verbs import ACTIONS, CHECKPOINT, CONVERT_OPTIONS, EXAMPLES, VERBS, Verb

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141

# The file system's refusals that a user can mend; any other OSError is a fault of ours and keeps
# its traceback.
REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        outcome = _run(options)
        # What is still held back is written here, where a closed pipe is heard.
        sys.stdout.flush()
    except BrokenPipeError:
        return _leave_closed_pipe()
    except (InputError, OSError) as error:
        is_fault_of_ours = isinstance(error, OSError) and error.errno not in REFUSALS
        if options.debug or is_fault_of_ours:
            raise
        _report(options, _one_line(error))
        return EXIT_BAD_INPUT
    except RunError as error:
        if options.debug:
            raise
        _report(options, str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        if options.debug:
            raise
        _report(options, "interrupted")
        return EXIT_INTERRUPTED
    # The outcome of a run that a signal stopped has an exit status.
    return getattr(outcome, "exit_status", 0)


def _leave_closed_pipe() -> int:
    """Whoever read our output has closed it, as `head` does; Python would write to it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_CLOSED_PIPE


def _run(options: argparse.Namespace) -> Any:
    with Preemption(), _log_on_stderr():
        if options.verb == "checkpoint":
            return _run_action(options)
        verb = VERBS[options.verb]
        function = load(verb.function)
        if not verb.has_file:
            return config.run(function, [], _overrides(options))
        path = Path(options.file)
        if path.is_dir():
            return _run_saved(function, path, options)
        return config.run(function, [path], _overrides(options), options.admit)


def _run_saved(function: Callable, directory: Path, options: argparse.Namespace) -> Any:
    """Calls a verb with what a run has saved in its directory, wherever that lies by now.

    Or with a folder of Hugging Face, whose weights lie there.
    """
    overrides = [f"run.directory={str(directory)!r}", *_overrides(options)]
    with load("jaxscale.run.huggingface:configuration_of")(directory) as file:
        return config.run(function, [file], overrides, options.admit or ())


def _run_action(options: argparse.Namespace) -> None:
    """Calls what looks at a checkpoint; it takes paths and has no gin file."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name in ("verb", "action", "debug"):
        del given[name]
    load(f"{CHECKPOINT}:{options.action}")(**given)


def _overrides(options: argparse.Namespace) -> list[str]:
    """What `--set` gives, and the verb's own option, flags and words as if `--set` gave them."""
    verb = VERBS[options.verb]
    own = [name for name, *_ in (*verb.words, *filter(None, [verb.option]))]
    own += [name for name, _ in verb.flags if getattr(options, name)]
    given = {name: getattr(options, name) for name in own}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return [*options.set, *(f"{name}={value!r}" for name, value in values.items())]


class _Printer(logging.Handler):
    """Writes log messages above a progress bar, each text once.

    Tracing chooses a backend anew in every layer, and would log the same choice each time.
    """

    def __init__(self):
        super().__init__()
        self._written: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if message not in self._written:
            self._written.add(message)
            tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows what the library logs: chosen backends, the peak behind MFU, resumes."""
    shorten_errors()
    logger = logging.getLogger("jaxscale")
    printer = _Printer()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(printer)
    # Another library may have given the root logger a handler, which would print everything again.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(printer)
        logger.setLevel(level)
        logger.propagate = True


class _VerbParser(argparse.ArgumentParser):
    """A parser whose help ends with the parameters of the verb's function."""

    function: str | None = None

    def format_help(self) -> str:
        """The help; the function is imported now."""
        text = super().format_help()
        if self.function is None:
            return text
        fields = load("jaxscale.run.describe:fields_text")(load(self.function))
        return f"{text}\nparameters, by --set NAME=VALUE:\n{fields}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jaxscale",
        description=jaxscale.__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxscale {jaxscale.__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, parser_class=_VerbParser
    )
    for name, verb in VERBS.items():
        _add_verb(verbs, name, verb)
    _add_checkpoint(verbs)
    return parser


def _add_checkpoint(verbs: Any) -> None:
    """The verb that takes paths instead of a gin file."""
    meaning = "look at a checkpoint of any system, check, convert or compare it"
    actions = verbs.add_parser("checkpoint", help=meaning, description=f"{meaning.capitalize()}.")
    actions = actions.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, does in ACTIONS.items():
        parser = actions.add_parser(name, help=does, description=f"{does.capitalize()}.")
        parser.add_argument("path", metavar="PATH", help="a step, a folder of steps, or another's")
        if name != "ls":
            parser.add_argument("--rules", help="TOML file: which parameter each tensor is part of")
        if name == "diff":
            parser.add_argument("other", metavar="OTHER", help="what to compare it with")
        if name == "convert":
            parser.add_argument("destination", metavar="DESTINATION", help="folder of checkpoints")
            for option, help_text in CONVERT_OPTIONS.items():
                parser.add_argument(f"--{option}", help=help_text)
            parser.add_argument("--step", type=int, help="number of the new checkpoint")
            rate = "of the next step, which deepspeed's form keeps"
            parser.add_argument("--learning_rate", type=float, help=rate)
        parser.add_argument("--debug", action="store_true", help="show the traceback of bad input")


def _add_verb(verbs: Any, name: str, verb: Verb) -> None:
    function = verb.function.replace(":", ".")
    does = f"{verb.help[0].upper()}{verb.help[1:]}."
    if verb.has_file:
        does += f" The file binds the run and other parameters of {function}."
    else:
        does += f" `--set` gives other parameters of {function}."
    parser = verbs.add_parser(
        name,
        help=verb.help,
        description=does,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.function = verb.function
    if verb.has_file:
        _add_file(parser)
    for word in verb.words:
        repeated = {"nargs": "+"} if word.is_repeated else {}
        parser.add_argument(word.name, metavar=word.name.upper(), help=word.help, **repeated)
    parser.add_argument(
        "--set",
        metavar="NAME.FIELD=VALUE",
        action="append",
        default=[],
        help="override one value",
    )
    if verb.option:
        option, meaning = verb.option
        parser.add_argument(f"--{option}", required=True, help=meaning)
    for flag, meaning in verb.flags:
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    parser.add_argument("--debug", action="store_true", help="show the traceback of bad input")


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE.gin",
        help="says what the verb works on; or a run's directory, whose saved configuration does",
    )
    parser.add_argument(
        "--admit",
        metavar="MODULE",
        action="append",
        help="for a file that is not yours: it may name only what jaxscale and this module define"
        " (repeatable); so it is, without any module, for a run's saved configuration",
    )


def load(function: str) -> Callable:
    """The function of a verb, imported now."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def _report(options: argparse.Namespace, message: str) -> None:
    print(f"jaxscale {options.verb}: {message}", file=sys.stderr)


def _one_line(error: InputError | OSError) -> str:
    """The error's message on one line.

    An error of the file system names the path first, as an InputError does its parameter.
    """
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror}"
    return " ".join(str(error).split())
