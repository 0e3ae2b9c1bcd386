"""The `jaxscale` command: each verb calls one function with what a gin file and `--set` give it."""

import argparse
import contextlib
import errno
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

import jaxscale
from jaxscale import config
from jaxscale.types import InputError, RunError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
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

    `bound_as` is the function whose parameters the gin file binds, where the verb takes the
    arguments of another one; `option` is a parameter of the function that the command line gives,
    with its help.
    """

    function: str
    help: str
    bound_as: str = ""
    option: tuple[str, str] | None = None


VERBS = {
    "pretrain": Verb(
        "jaxscale.run.pretrain:pretrain",
        "train a model; resumes if the run's directory has a checkpoint",
    ),
    "generate": Verb("jaxscale.serve.generate:generate", "sample text from a checkpoint"),
    "evaluate": Verb(
        "jaxscale.evaluate.perplexity:evaluate", "measure a checkpoint on held-out text"
    ),
    "tokenizer": Verb("jaxscale.data.tokenizer:train_tokenizer", "train a tokenizer"),
    "inspect": Verb(
        "jaxscale.run.inspect:inspect",
        "print a training run's configuration, parameters, shardings and bytes; allocates nothing",
        bound_as="jaxscale.run.pretrain:pretrain",
    ),
    "compile": Verb(
        "jaxscale.run.compile:compile_step",
        "compile a run's step for GPUs that are not here; print memory and collectives; exit 1 if it does not fit",
        bound_as="jaxscale.run.pretrain:pretrain",
        option=("topology", "MACHINE:HOSTSxGPUS_PER_HOST, such as h200:16x8"),
    ),
}

EXAMPLES = """\
examples:
  jaxscale inspect experiments/configs/runs/main_job.gin
  jaxscale compile experiments/configs/runs/llama_1b.gin --topology h200:16x8 --set mesh.data=128 \\
      --set data.batch_size=512
  jaxscale tokenizer experiments/configs/runs/main_job.gin
  jaxscale pretrain experiments/configs/runs/main_job.gin --set train.steps=100 --set mesh.zero=3
  jaxscale pretrain runs/main_job/config.gin --set directory=runs/again    # repeats a run from what it left behind
  jaxscale generate experiments/configs/runs/main_job.gin --set 'prompts="Once upon"'

--set FIELD=VALUE            a parameter of the verb's function
--set NAME.FIELD=VALUE       a field of the configuration that its parameter NAME holds, and so on inwards
--set SCOPE/NAME.FIELD=VALUE the same in one gin scope, where a file configures two of a kind
--set MACRO=VALUE            a macro of the file, such as DIRECTORY
VALUE is a Python literal; anything else is taken as text.

exit status: 0 done, 1 the run failed, 2 bad input (one line says what was given and what was expected),
143 or 130 stopped by SIGTERM or SIGINT (a training run saves everything first),
75 or 134 another process of the run is stuck or dead: start it again
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        verb = VERBS[options.verb]
        function, bound_as = _load(verb.function), _load(verb.bound_as or verb.function)
        if verb.option:
            function = functools.partial(
                function, **{verb.option[0]: getattr(options, verb.option[0])}
            )
        with _news_on_stderr():
            outcome = config.run(function, [options.file], options.set, bound_as=bound_as)
    except (InputError, OSError) as error:
        if options.debug or (isinstance(error, OSError) and error.errno not in REFUSALS):
            raise
        print(f"jaxscale {options.verb}: {_one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunError as error:
        if options.debug:
            raise
        print(f"jaxscale {options.verb}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        if options.debug:
            raise
        print(f"jaxscale {options.verb}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return getattr(outcome, "exit_status", 0)  # a run that a signal stopped says so


class _News(logging.Handler):
    """Writes each message once (a backend is chosen anew in every layer that is traced), above a progress bar."""

    def __init__(self):
        super().__init__()
        self._written: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if message not in self._written:
            self._written.add(message)
            tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def _news_on_stderr() -> Iterator[None]:
    """Shows what the library logs: chosen backends, the peak behind MFU, resumes."""
    logger, news = logging.getLogger("jaxscale"), _News()
    level, logger.propagate = (
        logger.level,
        False,
    )  # a library may have given the root logger a handler of its own
    logger.setLevel(logging.INFO)
    logger.addHandler(news)
    try:
        yield
    finally:
        logger.removeHandler(news)
        logger.setLevel(level)
        logger.propagate = True


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "jaxscale", description=jaxscale.__doc__, epilog=EXAMPLES, formatter_class=layout
    )
    parser.add_argument("--version", action="version", version=f"jaxscale {jaxscale.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        bound = (verb.bound_as or verb.function).replace(":", ".")
        description = (
            f"{verb.help[0].upper()}{verb.help[1:]}. The file binds the parameters of {bound}."
        )
        each = verbs.add_parser(
            name,
            help=verb.help,
            description=description,
            epilog=EXAMPLES,
            formatter_class=layout,
            allow_abbrev=False,
        )
        each.add_argument("file", metavar="FILE.gin", help="binds the function's parameters")
        each.add_argument(
            "--set",
            metavar="NAME.FIELD=VALUE",
            action="append",
            default=[],
            help="override one value",
        )
        if verb.option:
            each.add_argument(f"--{verb.option[0]}", required=True, help=verb.option[1])
        each.add_argument("--debug", action="store_true", help="show the traceback of bad input")
    return parser


def _load(function: str) -> Callable:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def _one_line(error: InputError | OSError) -> str:
    """The error's message on one line; the file system's errors name the path first, as others do their parameter."""
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
