"""Every gin file of the experiments binds names that exist to values of their types, and its model and mesh fit."""

import inspect
import itertools
import shlex
from pathlib import Path

import jax
import pytest

from jaxscale import cli, config
from jaxscale.bindings import REQUIRED, Bindings, Builder, Macro
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import abstract_params, count_parameters
from jaxscale.ops.precision import Policy
from jaxscale.train.plan import check_fit
from jaxscale.train.pretrain import pretrain
from jaxscale.types import InputError

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
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
    bind(path)


@each_file
def test_the_run_fits(path, tmp_path, capsys):
    """A file that binds a verb's parameters gives it all of them; a training run is inspected, which is abstract."""
    bindings = config.read([path])
    if left_open(bindings):
        pytest.skip("left open for another file or --set: " + ", ".join(left_open(bindings)))
    for name, verb in cli.VERBS.items():
        function = cli._load(verb.bound_as or verb.function)
        if bindings.of(function, ()):
            overrides = [f"directory={tmp_path}"] if is_directory_open(bindings, function) else []
            loaded = config.load(function, [path], overrides)
            if name == "inspect":
                cli._load(verb.function)(**loaded.arguments)
                assert capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted((EXPERIMENTS / "bench").glob("*.txt")), ids=lambda path: path.stem
)
def test_the_commands_of_a_list_fit(path, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len({line.split("|")[0] for line in lines}) == len(lines)
    for words in (shlex.split(line.split("|", 1)[1]) for line in lines):
        (script,) = (word for word in words if word.endswith(".py"))
        assert Path(script).is_file()
        for file in (word for word in words if word.endswith(".gin")):
            overrides = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
            run = dict(policy=Policy()) | config.load(pretrain, [file], overrides).arguments
            check_fit(
                **{
                    name: run[name]
                    for name in ("model", "mesh", "data", "train", "policy", "stack")
                }
            )


def bind(path: Path) -> None:
    """Binds all that a file binds: each value is built and checked, each complete configuration constructed."""
    bindings = config.read([path])
    bindings.check_scopes()
    incomplete = {name.split(".")[0] for name in left_open(bindings)}
    for scopes, target in list(bindings.parameters):
        if target.__name__ in incomplete:
            continue
        built, _ = Builder(bindings).bound(target, scopes)
        signature = inspect.signature(target).parameters.values()
        if inspect.isclass(target) and all(
            each.name in built or each.default is not each.empty for each in signature
        ):
            check_shapes(target(**built))


def check_shapes(built) -> None:
    """A model has a parameter tree; the constructors of other configurations check all that they can."""
    if isinstance(built, ModelConfig):
        assert count_parameters(built)[0] == sum(
            leaf.size for leaf in jax.tree.leaves(abstract_params(built, "float32"))
        )


def test_grin_has_the_parameters_of_its_paper():
    """Those that multiply a token and those that look it up."""
    bindings = config.read([CONFIGS / "papers" / "grin_moe.gin"])
    model = ModelConfig(**Builder(bindings).bound(ModelConfig, ())[0])
    total, active = count_parameters(model)
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


def is_directory_open(bindings: Bindings, function) -> bool:
    return "directory" in inspect.signature(function).parameters and "directory" not in bindings.of(
        function, ()
    )


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
        bind(path)
