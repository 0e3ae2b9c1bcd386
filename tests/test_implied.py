"""A run is bound once: the bindings of their classes build its parts, and --set finds them."""

import dataclasses

import pytest

from jaxscale import config
from jaxscale.types import InputError

LIBRARY = """
import dataclasses
from jaxscale.types import check_types

class Checked:
    def __post_init__(self):
        check_types(self)

@dataclasses.dataclass(frozen=True)
class Norm(Checked):
    kind: str = "rmsnorm"

@dataclasses.dataclass(frozen=True)
class Attention(Checked):
    window: int | None = None
    norm: Norm | None = None

@dataclasses.dataclass(frozen=True)
class Dense(Checked):
    dim: int

@dataclasses.dataclass(frozen=True)
class Experts(Checked):
    dim: int = 4
    num: int = 2

@dataclasses.dataclass(frozen=True)
class Layer(Checked):
    feed_forward: Dense | Experts
    attention: Attention = Attention()
    extra: Dense | Experts | None = None

@dataclasses.dataclass(frozen=True)
class Model(Checked):
    size: int
    pattern: tuple[Layer, ...] = (Layer(Dense(1)), Layer(Dense(2)))
    weights: tuple[float, ...] = (1.0, 2.0)

@dataclasses.dataclass(frozen=True)
class Policy(Checked):
    compute: str = "bfloat16"
    parameters: str = "float32"

@dataclasses.dataclass(frozen=True)
class Tokenizer(Checked):
    kind: str = "bytes"

@dataclasses.dataclass(frozen=True)
class Teacher(Checked):
    size: int = 1
    teacher: "Teacher | None" = None

def next_token(weight=1.0):
    return weight

@dataclasses.dataclass(frozen=True)
class Run(Checked):
    directory: str
    model: Model
    policy: Policy = Policy(compute="float16")
    tokenizer: Tokenizer = dataclasses.field(default_factory=lambda: Tokenizer("trained"))
    teacher: Teacher | None = None
    loss: object = next_token
    losses: dict[str, object] = dataclasses.field(default_factory=dict)

@dataclasses.dataclass(frozen=True)
class Sampling(Checked):
    top_p: float = 1.0

def train(*, run: Run):
    return run

def generate(*, run: Run, prompts: str = "", sampling: Sampling = Sampling()):
    return run, prompts, sampling

def layer(*, layer: Layer):
    return layer
"""
HEADER = "from __gin__ import dynamic_registration\nimport parts\n"
SMALLEST = HEADER + "parts.Run.directory = 'x'\nparts.Model.size = 3\n"
DENSE = HEADER + "parts.Dense.dim = 8\n"
TWO = """
parts.Model.pattern = (@parts.Layer(), @parts.Layer())
parts.Layer.feed_forward = @parts.Dense()
parts.Dense.dim = 8
"""
SCOPED = """
parts.Model.pattern = (@local/parts.Layer(), @parts.Layer())
local/parts.Attention.window = 16
parts.Attention.norm = @parts.Norm()
parts.Experts.num = 3
parts.Policy.parameters = %TYPE
TYPE = 'bfloat16'
parts.Run.losses = {'next': @parts.next_token}
parts.next_token.weight = 2.0
"""


@pytest.fixture
def parts(import_text):
    return import_text("parts", LIBRARY)


@pytest.fixture
def load(parts, tmp_path):
    """What a file and overrides give a function of the module, and the operative configuration."""

    def load(name: str, text: str, *overrides: str) -> config.Loaded:
        (tmp_path / "a.gin").write_text(text)
        return config.load(getattr(parts, name), [tmp_path / "a.gin"], overrides)

    return load


@pytest.fixture
def run(load):
    return lambda text, *overrides: load("train", text, *overrides).arguments["run"]


def test_what_has_no_default_is_built_without_being_bound(run, parts):
    assert run(SMALLEST) == parts.Run("x", parts.Model(3))


def test_a_default_gives_way_to_bindings_of_its_class(run, parts):
    assert run(SMALLEST).policy == parts.Policy("float16")
    given = run(SMALLEST + "parts.Policy.parameters = 'float16'\nparts.Tokenizer.kind = 'bpe'\n")
    assert given.policy == parts.Policy(parameters="float16")
    assert given.tokenizer == parts.Tokenizer("bpe")
    assert run(SMALLEST + "parts.Teacher.size = 2\n").teacher == parts.Teacher(2)


def test_an_explicit_binding_wins_also_none(run, load, parts):
    text = SMALLEST + "parts.Teacher.size = 2\nparts.Run.teacher = None\n"
    assert run(text).teacher is None
    assert run(SMALLEST + "parts.Teacher.size = 2\n", "teacher=None").teacher is None
    text = SMALLEST + "parts.Run.model = @big/parts.Model()\nbig/parts.Model.size = 9\n"
    assert run(text).model.size == 9
    switched = "parts.Norm.kind = 'layernorm'\nparts.Attention.norm = None\n"
    given = load("layer", DENSE + switched + "parts.Attention.window = 4\n").arguments["layer"]
    assert given.attention == parts.Attention(4)


def test_parts_are_built_in_the_scope_of_the_whole(load, parts):
    text = SMALLEST + "parts.generate.run = @one/parts.Run()\none/parts.Model.size = 1\n"
    assert load("train", text).arguments["run"].model.size == 3
    given = load("generate", text + "one/parts.Policy.compute = 'float32'\n").arguments["run"]
    assert (given.model.size, given.policy, given.directory) == (1, parts.Policy("float32"), "x")
    given = load("train", text + "one/parts.Policy.compute = 'float32'\n").arguments["run"]
    assert given.policy == parts.Policy("float16")


def test_a_class_that_may_hold_itself_is_built_once(run, parts):
    text = SMALLEST + "parts.Teacher.size = 2\n"
    assert run(text).teacher == parts.Teacher(2)
    inner = "parts.Teacher.teacher = @{}parts.Teacher()\n"
    given = run(text + inner.format("inner/") + "inner/parts.Teacher.teacher = None\n")
    assert given.teacher == parts.Teacher(2, parts.Teacher(2))
    with pytest.raises(InputError, match=r"Teacher: given '@parts\.Teacher\(\)', .* itself"):
        run(text + inner.format(""))


def test_of_several_classes_the_one_with_bindings_is_built(load, parts):
    def feed_forward(text, *overrides):
        return load("layer", text, *overrides).arguments["layer"].feed_forward

    assert feed_forward(DENSE) == parts.Dense(8)
    assert feed_forward(DENSE, "layer.feed_forward.dim=9") == parts.Dense(9)
    assert feed_forward(HEADER + "parts.Experts.num = 7\n") == parts.Experts(num=7)
    both = DENSE + "parts.Experts.num = 7\n"
    chosen = both + "parts.Layer.feed_forward = @parts.Experts()\n"
    assert feed_forward(chosen) == parts.Experts(num=7)
    with pytest.raises(InputError, match="value for each of feed_forward"):
        feed_forward(HEADER)
    message = (
        r"Layer\.feed_forward: given 'bindings of Dense and Experts', expected "
        r"`parts\.Layer\.feed_forward = @parts\.Dense\(\)` or .*Experts\(\)`: .* bound explicitly"
    )
    for overrides in ((), ("layer.feed_forward.dim=9",)):
        with pytest.raises(InputError, match=message):
            feed_forward(both, *overrides)
    with pytest.raises(InputError, match=r"extra: given 'None', .*bind @parts\.Dense\(\) or @"):
        feed_forward(DENSE, "layer.extra.dim=9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "parts.Run.teacher = None\nparts.Teacher.size = 2\n",
            r"a\.gin:6: Teacher\.size: given '2', .*`parts\.Run\.teacher = @parts\.Teacher\(\)`",
        ),
        (
            "parts.Dense.dim = 8\n",
            r"a\.gin:5: Dense\.dim: given '8', expected also `@parts\.Dense\(\)`: nothing builds",
        ),
        (
            TWO + "parts.Layer.extra = None\nparts.Experts.num = 3\n",
            r"a\.gin:10: Experts\.num: .*`parts\.Layer\.feed_forward = @parts\.Experts\(\)`",
        ),
        (
            "parts.Sampling.top_p = 0.5\n",
            r"a\.gin:5: Sampling\.top_p: given '0\.5', expected also `@parts\.Sampling\(\)`",
        ),
        ("big/parts.Model.size = 2\n", r"a\.gin:5: big/Model: .*a scope that a reference enters"),
        ("parts.Model.size = %gin.REQUIRED\n", r"a\.gin:5: Model\.size: .*REQUIRED.*--set"),
    ],
)
def test_a_binding_that_builds_nothing_is_refused(run, text, message):
    with pytest.raises(InputError, match=message):
        run(SMALLEST + text)


def test_a_file_serves_several_verbs(load, parts):
    text = SMALLEST + "parts.generate.prompts = 'a'\nparts.Sampling.top_p = 0.5\n"
    assert load("train", text).arguments == {"run": parts.Run("x", parts.Model(3))}
    given = load("generate", text, "prompts=b", "model.size=4").arguments
    assert given.pop("run").model.size == 4
    assert given == {"prompts": "b", "sampling": parts.Sampling(0.5)}


def test_required_and_macros_keep_working(run):
    text = SMALLEST + "parts.Model.size = %gin.REQUIRED\nparts.Policy.compute = %TYPE\nTYPE = 'a'\n"
    given = run(text, "model.size=5", "TYPE=b")
    assert (given.model.size, given.policy.compute) == (5, "b")


@pytest.mark.parametrize("prefix", ["", "run."])
def test_an_override_names_fields_of_the_run(run, prefix, parts):
    names = ("directory=y", "model.size=4", "policy.parameters=float16", "tokenizer.kind=bpe")
    given = run(SMALLEST, *(prefix + name for name in names))
    assert (given.directory, given.model.size) == ("y", 4)
    # What has a default starts from it.
    assert given.policy == parts.Policy("float16", "float16")
    assert given.tokenizer == parts.Tokenizer("bpe")


def test_an_override_of_a_default_starts_from_what_is_bound(run, parts):
    given = run(SMALLEST + "parts.Policy.parameters = 'float16'\n", "policy.compute=float64")
    assert given.policy == parts.Policy("float64", "float16")


def test_an_override_builds_what_may_be_none(run, parts):
    assert run(SMALLEST, "teacher.size=4").teacher == parts.Teacher(4)


def test_an_override_in_a_scope_goes_through_the_run(load):
    text = SMALLEST + "parts.generate.run = @one/parts.Run()\n"
    given = load("generate", text, "one/model.size=1").arguments["run"]
    assert given.model.size == 1
    assert load("train", text, "one/model.size=1").arguments["run"].model.size == 3


@pytest.mark.parametrize(
    "text", ["", TWO, TWO.replace("(@parts.Layer(), ", "(@local/parts.Layer(), ")]
)
def test_a_number_selects_one_item_of_a_tuple(run, text):
    before = run(SMALLEST + text).model.pattern
    overrides = ("model.pattern.0.attention.window=128", "model.pattern.0.attention.norm.kind=x")
    given = run(SMALLEST + text, *overrides).model.pattern
    attention = dataclasses.replace(before[0].attention, window=128)
    assert given[0].attention.norm.kind == "x"
    assert dataclasses.replace(given[0].attention, norm=None) == attention
    assert given[0].feed_forward == before[0].feed_forward
    assert given[1] == before[1]


def test_an_item_may_be_overridden_again(run, load):
    text = load("train", SMALLEST + TWO, "model.pattern.1.attention.window=1").text
    given = run(text, "model.pattern.1.attention.window=2", "model.pattern.0.feed_forward.dim=3")
    assert [layer.attention.window for layer in given.model.pattern] == [None, 2]
    assert [layer.feed_forward.dim for layer in given.model.pattern] == [3, 8]


def test_an_item_itself_may_be_given(run):
    assert run(SMALLEST, "model.weights.1=7.0").model.weights == (1.0, 7.0)
    with pytest.raises(InputError, match=r"weights\.1=a: Model\.weights: .*tuple\[float, \.\.\.\]"):
        run(SMALLEST, "model.weights.1=a")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("directry=y", "--set directry=y: directry: .*directory.*; closest is 'directory'"),
        ("modle.size=4", "modle: given 'modle', expected one of .*; closest is 'model'"),
        ("model.sise=4", r"--set model\.sise=4: Model\.sise: .*closest is 'size'"),
        ("model.patern.0.extra=4", r"Model\.patern: given 'patern', .*closest is 'pattern'"),
        ("model.pattern.2.extra=4", r"pattern\.2: given 2, expected a number below 2, the number"),
        ("model.size.0=4", r"size\.0: given '3', expected a tuple, from which a number selects"),
        ("model.weights.0.size=4", r"weights\.0: given '1\.0', expected a configuration that has"),
        ("0.size=4", "--set: given '0.size=4', expected NAME.FIELD=VALUE or FIELD=VALUE"),
        ("model..size=4", "expected NAME.FIELD=VALUE"),
        ("model.0size=4", "expected NAME.FIELD=VALUE"),
    ],
)
def test_a_mistake_in_a_path_is_named(run, override, message):
    with pytest.raises(InputError, match=message):
        run(SMALLEST, override)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", ()),
        ("parts.Policy.compute = 'float64'\n", ("policy.parameters=bfloat16",)),
        ("parts.Teacher.size = 2\n", ("teacher.size=3", "tokenizer.kind=bpe")),
        (TWO, ("model.pattern.1.attention.norm.kind=x", "model.pattern.0.extra=None")),
        ("", ("model.pattern.0.feed_forward.dim=7", "model.weights.0=3.0")),
        (SCOPED, ("model.pattern.1.attention.window=5", "policy.compute=float64")),
        (SCOPED, ()),
    ],
)
def test_the_operative_configuration_repeats_the_run(load, text, overrides):
    first = load("train", SMALLEST + text, *overrides)
    second = load("train", first.text)
    assert second.text == first.text
    assert "parts.train.run = @parts.Run()" in first.text
    before, after = first.arguments["run"], second.arguments["run"]
    # A partial function equals nothing but itself.
    assert str(after.losses) == str(before.losses)
    assert dataclasses.replace(after, losses={}) == dataclasses.replace(before, losses={})


def test_the_operative_configuration_holds_what_is_default(load):
    text = load("train", SMALLEST).text
    assert "parts.Run.loss = @parts.next_token\n" in text
    pattern = "(@Model/pattern_0/parts.Layer(), @Model/pattern_1/parts.Layer())"
    assert f"parts.Model.pattern = {pattern}\n" in text
    assert "Run/tokenizer/parts.Tokenizer.kind = 'trained'\n" in text
