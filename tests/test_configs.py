"""Every gin file of the experiments binds names that exist to values of their types.

And its model and mesh fit.
"""

import importlib.util
import inspect
import itertools
import re
import shlex
from pathlib import Path

import jax
import pytest

from jaxscale import cli, config
from jaxscale.bindings import REQUIRED, Bindings, Builder, Macro
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import abstract_params, count_parameters, parameter_table
from jaxscale.run.fit import check_fit
from jaxscale.run.inspect import inspect as inspect_run
from jaxscale.run.pretrain import pretrain
from jaxscale.run.run import Run
from jaxscale.types import InputError

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
spec = importlib.util.spec_from_file_location("in_turn", EXPERIMENTS / "bench/in_turn.py")
in_turn = importlib.util.module_from_spec(spec)
spec.loader.exec_module(in_turn)
CONFIGS = EXPERIMENTS / "configs"
FILES = sorted(CONFIGS.rglob("*.gin"))


def each_file(test):
    return pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))(
        test
    )


def test_there_are_files():
    assert FILES


@each_file
def test_the_header_says_what_the_file_is(path):
    assert path.read_text().startswith("# "), "the first line says what the file configures"


@each_file
def test_every_name_is_known_and_every_value_of_its_type(path):
    assert_binds(path)


@each_file
def test_the_run_fits(path, capsys):
    """A file of a whole run is inspected, which is abstract."""
    bindings = config.read([path])
    if "directory" not in bindings.of(Run, ()):
        pytest.skip("it is a part of runs")
    inspect_run(**config.load(inspect_run, [path]).arguments)
    assert capsys.readouterr().out


@each_file
def test_a_run_file_is_short(path):
    """Under 25 lines that say something; what several runs share lies in the files it includes."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert path.parent not in (CONFIGS / "runs", CONFIGS / "papers") or len(lines) < 25


@each_file
def test_the_verbs_parameters_are_complete(path):
    if path.relative_to(CONFIGS).parts[0] not in ("runs", "papers"):
        pytest.skip("it is a part of runs")
    bindings = config.read([path])
    if left_open(bindings):
        pytest.skip("left open for another file or --set: " + ", ".join(left_open(bindings)))
    for verb in cli.VERBS.values():
        function = cli.load(verb.function)
        if bindings.of(function, ()):
            assert config.load(function, [path]).arguments


@pytest.mark.parametrize(
    "path", sorted((EXPERIMENTS / "bench").glob("*.txt")), ids=lambda path: path.stem
)
def test_the_commands_of_a_list_fit(path, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    lines = in_turn.read_lines(path)
    assert len({line.file_name for line in lines}) == len(lines)
    commands = [each for line in lines for each in re.split("&&|;", line.command)]
    for words in filter(None, map(shlex.split, commands)):
        for script in (word for word in words if word.endswith(".py")):
            assert Path(script).is_file()
        overrides = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
        for file in (word for word in words if word.endswith(".gin")):
            if "jaxscale" in words:  # a verb with options of its own
                assert config.read([file]).parameters
            else:
                check_fit(config.load(pretrain, [file], overrides).arguments["run"])


def assert_binds(path: Path) -> None:
    """Binds all that a file binds.

    Each value is built and checked, each complete configuration constructed.
    """
    bindings = config.read([path])
    bindings.check_scopes()
    if left_open(bindings):
        return  # its names are checked as it is read
    for scopes, target in list(bindings.parameters):
        built, _ = Builder(bindings).bound(target, scopes)
        signature = inspect.signature(target).parameters.values()
        if inspect.isclass(target) and all(
            each.name in built or each.default is not each.empty for each in signature
        ):
            check_shapes(target(**built))


def check_shapes(built) -> None:
    """A model has a parameter tree.

    The constructors of other configurations check all that they can.
    """
    if isinstance(built, ModelConfig):
        assert count_parameters(parameter_table(built))[0] == sum(
            leaf.size
            for leaf in jax.tree.leaves(abstract_params(parameter_table(built), "float32"))
        )


def test_grin_has_the_parameters_of_its_paper():
    """Those that multiply a token and those that look it up."""
    file = CONFIGS / "papers" / "grin_moe.gin"
    model = config.load(pretrain, [file]).arguments["run"].model
    total, active = count_parameters(parameter_table(model))
    assert round(total / 1e9, 3) == 41.873
    assert round((active + model.vocab_size * model.model_dim) / 1e9, 3) == 6.641


def left_open(bindings: Bindings) -> list[str]:
    """What a file marks as required from another file or --set."""
    return [
        f"{target.__name__}.{name}"
        for (_, target), bound in bindings.parameters.items()
        for name, binding in bound.items()
        if binding.value == Macro(REQUIRED)
    ]


@pytest.mark.parametrize(
    "line",
    [
        "types.InputErorr.given = 1",
        "types.InputError.gven = 1",
        "types.InputError.expected = 1",
        "a = = 1",
    ],
)
def test_a_file_that_cannot_be_bound_fails(line, tmp_path):
    path = tmp_path / "a.gin"
    path.write_text(
        f"from __gin__ import dynamic_registration\nfrom jaxscale import types\n{line}\n"
    )
    with pytest.raises(InputError, match=r"a\.gin:3"):
        assert_binds(path)
