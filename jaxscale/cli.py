"""The `jaxscale` command: each verb calls one function with what a gin file and `--set` give it."""

import argparse
import contextlib
import errno
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import jaxscale
from jaxscale import config
from jaxscale.types import InputError, RunError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
RUN_FILE = "config.gin"  # in a run's directory

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
    "evaluate": Verb(
        "jaxscale.run.evaluate:evaluate",
        "measure a checkpoint on held-out text",
    ),
    "tokenizer": Verb(
        "jaxscale.data.tokenizer:train_tokenizer",
        "train a tokenizer",
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
        "make a run's directory in which new low-rank adapters of a model are trained",
        words=(("directory", "of the new run"),),
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
}

EXAMPLES = """\
examples:
  jaxscale inspect experiments/configs/runs/main_job.gin
  jaxscale compile experiments/configs/runs/llama_1b.gin --topology h200:16x8 \\
      --set mesh.data=128 --set data.batch_size=512
  jaxscale tokenizer experiments/configs/runs/main_job.gin
  jaxscale pretrain experiments/configs/runs/main_job.gin --set train.steps=100 --set mesh.zero=3
  jaxscale generate experiments/configs/runs/main_job.gin --set 'prompts="Once upon"'
  jaxscale import models/phi3 --set directory=runs/phi3
  jaxscale adapt runs/phi3 runs/phi3_lora --set lora.rank=8
  jaxscale pretrain runs/phi3_lora --set directory=runs/phi3_tuned --set train.steps=100
  jaxscale chat runs/phi3 --set sampling.temperature=0.7
  jaxscale export runs/phi3 models/phi3_tuned

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
  143 or 130  stopped by SIGTERM or SIGINT; a training run saves everything first
  75 or 134   another process of the run is stuck or dead: start it again
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        outcome = _run(options)
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


def _run(options: argparse.Namespace) -> Any:
    function = load(VERBS[options.verb].function)
    with _log_on_stderr():
        return config.run(function, _files(options), _overrides(options))


def _files(options: argparse.Namespace) -> list[Path]:
    """The verb's gin file, or that of a run's directory; none where the verb takes none."""
    if not VERBS[options.verb].has_file:
        return []
    path = Path(options.file)
    return [path / RUN_FILE if (path / RUN_FILE).is_file() else path]


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jaxscale",
        description=jaxscale.__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxscale {jaxscale.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        _add_verb(verbs, name, verb)
    return parser


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
    if verb.has_file:
        parser.add_argument("file", metavar="FILE.gin", help="says what the verb works on")
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


if __name__ == "__main__":
    sys.exit(main())
