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
from typing import Any, NamedTuple

from tqdm import tqdm

import jaxscale
from jaxscale import config
from jaxscale.launch.preemption import Preemption
from jaxscale.train.run_directory import CONFIG
from jaxscale.types import InputError, RunError

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


class Verb(NamedTuple):
    """Where a verb's function is, imported only when the verb is used, and a line of help.

    `option` is a parameter of the function that has an option of its own on the command line, with
    its help; `words` are parameters that stand on it without a name. `has_file` says whether a gin
    file or a run's directory comes before them.
    """

    function: str
    help: str
    option: tuple[str, str] | None = None
    words: tuple[tuple[str, str], ...] = ()
    has_file: bool = True


VERBS = {
    "pretrain": Verb(
        "jaxscale.run.pretrain:pretrain",
        "train a model; resumes if the run's directory has a checkpoint",
    ),
    "generate": Verb(
        "jaxscale.run.generate:generate",
        "sample text from a checkpoint",
    ),
    "serve": Verb(
        "jaxscale.run.serve:serve",
        "answer OpenAI's clients over HTTP with a checkpoint",
    ),
    "evaluate": Verb(
        "jaxscale.run.evaluate:evaluate",
        "measure a checkpoint on held-out text",
    ),
    "tokenizer": Verb(
        "jaxscale.data.tokenizer:train_tokenizer",
        "train a tokenizer",
    ),
    "data": Verb(
        "jaxscale.run.data:show_data",
        "show what a run will be trained on: counts, how full its rows are, a batch as text",
    ),
    "inspect": Verb(
        "jaxscale.run.inspect:inspect",
        "print a run's configuration, parameters, shardings and bytes; allocates nothing",
    ),
    "compile": Verb(
        "jaxscale.run.compile:compile_step",
        "compile a run's step for GPUs that are not here and print its memory and collectives;"
        " exit 1 if it does not fit",
        option=("topology", "MACHINE:HOSTSxGPUS_PER_HOST, such as h200:16x8"),
    ),
    "import": Verb(
        "jaxscale.run.huggingface:import_model",
        "make a run's directory of a folder of Hugging Face",
        words=(("source", "the folder: config.json, safetensors, tokenizer"),),
        has_file=False,
    ),
    "adapt": Verb(
        "jaxscale.run.adapt:adapt",
        "make a run's directory in which low-rank adapters of a model are trained",
        words=(("directory", "of the new run"),),
    ),
    "describe": Verb(
        "jaxscale.run.describe:describe",
        "print the fields of a part of a run, with their meanings and defaults",
        words=(("name", "a class or function that jaxscale.run names, such as OptimizerConfig"),),
        has_file=False,
    ),
    "chat": Verb(
        "jaxscale.run.chat:chat",
        "talk to an imported model in the terminal",
    ),
    "export": Verb(
        "jaxscale.run.huggingface:export_model",
        "write a checkpoint as a folder that Hugging Face loads",
        words=(("directory", "the new folder"),),
    ),
    "plan": Verb(
        "jaxscale.run.plan:plan",
        "find the fastest mesh for a run on devices that need not be here, say why others are"
        " slower, and write a file for pretrain",
        option=("devices", "DEVICE:HOSTSxDEVICES_PER_HOST, such as h200:2x8"),
    ),
}

CHECKPOINT = "jaxscale.run.checkpoint"
ACTIONS = {
    "ls": "list the checkpoints in a folder",
    "show": "print each array's type, shape and bytes",
    "verify": "check the whole by its checksums, or that all of it can be read",
    "convert": "write it as a checkpoint of jaxscale or of another system",
    "diff": "compare two array by array; exit 1 if they differ",
}
CONVERT_OPTIONS = {
    "to": "jaxscale (the default), deepspeed, safetensors or npz",
    "run": "gin file of the run that is to start from it",
    "budget": "host memory, such as 512MiB; 4GiB when not given",
}

EXAMPLES = """\
examples:
  jaxscale inspect experiments/configs/runs/main_job.gin
  jaxscale compile experiments/configs/runs/llama_1b.gin --topology h200:16x8 \\
      --set mesh.data=128 --set data.batch_size=512
  jaxscale plan experiments/configs/runs/llama_1b.gin --devices h200:2x8 \\
      --set data.batch_size=512
  jaxscale tokenizer experiments/configs/runs/main_job.gin
  jaxscale pretrain experiments/configs/runs/main_job.gin --set train.steps=100 --set mesh.zero=3
  jaxscale generate runs/main_job --set 'prompts="Once upon"'
  jaxscale import models/phi3 --set directory=runs/phi3
  jaxscale adapt runs/phi3 runs/phi3_lora --set lora.rank=8
  jaxscale chat runs/phi3 --set sampling.temperature=0.7
  jaxscale serve runs/phi3 --set port=8000
  jaxscale export runs/phi3 models/phi3_tuned
  jaxscale checkpoint show runs/main_job/checkpoints

A run leaves the file that repeats it in its directory, which may stand for the file:
  jaxscale pretrain runs/main_job/config.gin --set directory=runs/again

--set FIELD=VALUE             a parameter of the verb, such as prompts, or a field of the run,
                              such as directory
--set NAME.FIELD=VALUE        a field of the run's configuration NAME, and so on inwards; a number
                              selects an item of a tuple: model.pattern.0.attention.window=128
--set SCOPE/NAME.FIELD=VALUE  the same in one gin scope, where a file configures two of a kind
--set MACRO=VALUE             a macro of the file, such as DIRECTORY
VALUE is a Python literal; anything else is taken as text.

exit status:
  0           done
  1           the run failed
  2           bad input: one line says what was given and what was expected
  143 or 130  stopped by SIGTERM or SIGINT; a training run ends after its step and saves
              everything, before its first step it ends at once
  75 or 134   another process of the run is stuck or dead: start it again
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        outcome = _run(options)
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
    """Calls a verb with what a run has saved in its directory, wherever that lies by now."""
    overrides = [f"run.directory={str(directory)!r}", *_overrides(options)]
    return config.run(function, [directory / CONFIG], overrides, options.admit or ())


def _run_action(options: argparse.Namespace) -> None:
    """Calls what looks at a checkpoint; it takes paths and has no gin file."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name in ("verb", "action", "debug"):
        del given[name]
    load(f"{CHECKPOINT}:{options.action}")(**given)


def _overrides(options: argparse.Namespace) -> list[str]:
    """What `--set` gives, and the verb's own option and words as if `--set` gave them."""
    verb = VERBS[options.verb]
    own = [name for name, _ in (*verb.words, *filter(None, [verb.option]))]
    return [*options.set, *(f"{name}={getattr(options, name)!r}" for name in own)]


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
    for name, meaning in verb.words:
        parser.add_argument(name, metavar=name.upper(), help=meaning)
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
