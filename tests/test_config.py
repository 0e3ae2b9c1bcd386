"""gin files and overrides become the arguments of one function; an error says where."""

import functools
import math
import subprocess
import sys
import textwrap

import pytest

from jaxscale import config
from jaxscale.types import InputError

HOUSE = """
import dataclasses
from collections.abc import Callable
from jaxscale.config import operative_config
from jaxscale.types import InputError, check_types

@dataclasses.dataclass(frozen=True)
class Roof:
    slope: float = 0.5
    tiles: tuple[int, ...] = (1,)
    def __post_init__(self):
        check_types(self)
        if self.slope > 1:
            raise InputError("Roof.slope", self.slope, "at most 1")

@dataclasses.dataclass(frozen=True)
class Room:
    width: int
    height: int = 3
    roof: Roof | None = None

@dataclasses.dataclass(frozen=True)
class Shed:
    size: int = 1

def build(
    *,
    room: Room,
    roof: Roof = Roof(slope=0.25, tiles=(7, 8)),
    guest: Room | None = None,
    rooms: dict[str, Room] = {},
    paint: Callable | None = None,
    name: str = "",
    size: float = 1.0,
):
    return {**locals(), "text": operative_config()}

def paint(colour, coats=2):
    return colour, coats

WALLS = 4
"""
HEADER = "from __gin__ import dynamic_registration\nimport house\n"
SMALLEST = HEADER + "house.build.room = @house.Room()\nhouse.Room.width = 2\n"


@pytest.fixture
def house(import_text):
    return import_text("house", HOUSE)


@pytest.fixture
def load(tmp_path):
    """Writes a gin file and returns what it gives a function."""

    def load(function, text: str):
        (tmp_path / "a.gin").write_text(text)
        return config.load(function, [tmp_path / "a.gin"])

    return load


@pytest.fixture
def run(house, tmp_path):
    """Writes a gin file, runs `build` on it and returns what it was given."""

    def run(text: str, *overrides: str, name: str = "a.gin", **others: str):
        for other, content in others.items():
            (tmp_path / f"{other}.gin").write_text(textwrap.dedent(content))
        (tmp_path / name).write_text(textwrap.dedent(text))
        return config.run(house.build, [tmp_path / name], overrides)

    return run


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("import os\nos.system.command = 'touch x'\n", "os"),
        ("from jaxscale import cli\ncli.os.system.command = 'touch x'\n", "posix"),
        ("import jaxscale.cli\nX = @jaxscale.cli.importlib.import_module()\n", "importlib"),
        ("import house\n", "house"),
        ("import jaxscaled\n", "jaxscaled"),
    ],
)
def test_a_file_of_somebody_else_names_what_is_ours_and_what_is_admitted(
    text, module, house, tmp_path
):
    file = tmp_path / "a.gin"
    file.write_text("from __gin__ import dynamic_registration\n" + text)
    with pytest.raises(InputError, match=f"given '{module}'.*`--admit {module}` admits it"):
        config.load(house.build, [file], (), admitted=("other",))


def test_an_admitted_module_is_used(house, tmp_path):
    file = tmp_path / "a.gin"
    file.write_text(SMALLEST)
    loaded = config.load(house.build, [file], (), admitted=("house",))
    assert loaded.arguments["room"] == house.Room(width=2)
    file.write_text("include 'b.gin'\n")
    (tmp_path / "b.gin").write_text(SMALLEST)
    with pytest.raises(InputError, match="--admit house"):
        config.load(house.build, [file], (), admitted=())


def test_a_reference_builds_the_undecorated_class(run, house):
    given = run(SMALLEST)
    assert type(given["room"]) is house.Room
    assert given["room"] == house.Room(width=2, height=3)


def test_later_files_override_earlier_ones(house, tmp_path):
    (tmp_path / "a.gin").write_text(SMALLEST)
    (tmp_path / "b.gin").write_text(HEADER + "house.Room.width = 5\n")
    assert config.run(house.build, [tmp_path / "a.gin", tmp_path / "b.gin"])["room"].width == 5


def test_includes_are_found_beside_the_including_file(run, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "room.gin").write_text("include 'size.gin'\n" + SMALLEST)
    (tmp_path / "parts" / "size.gin").write_text(HEADER + "house.Room.height = 9\n")
    given = run(HEADER + "include 'parts/room.gin'\nhouse.Room.width = 4\n")
    assert (given["room"].width, given["room"].height) == (4, 9)


def test_the_last_binding_of_a_name_wins_across_includes(run):
    given = run(
        SMALLEST + "include 'b.gin'\nhouse.Room.height = 7\n",
        b=HEADER + "house.Room:\n  width = 8\n  height = 6\n",
    )
    assert (given["room"].width, given["room"].height) == (8, 7)


def test_a_file_that_includes_itself_is_refused(run):
    with pytest.raises(InputError, match="does not include itself"):
        run("include 'a.gin'\n")


def test_two_configurations_of_one_class_live_in_scopes(run):
    given = run(
        SMALLEST
        + """
house.build.guest = @guest/house.Room()
guest/house.Room.width = 1
house.Room.roof = @house.Roof()
guest/house.Roof.slope = 0.75
house.build.rooms = {'x': @guest/house.Room(), 'y': @house.Room()}
"""
    )
    assert (given["room"].width, given["guest"].width) == (2, 1)
    assert (given["room"].roof.slope, given["guest"].roof.slope) == (0.5, 0.75)
    assert given["rooms"] == {"x": given["guest"], "y": given["room"]}


def test_macros_blocks_and_imports_with_from_and_as(run):
    given = run("""
        from __gin__ import dynamic_registration
        import house as h
        WIDTH = 6
        h.Room:
          width = %WIDTH
          roof = @h.Roof()
        h.Roof.tiles = (%WIDTH, 2)
        h.build.room = @h.Room()
    """)
    assert given["room"].width == 6
    assert given["room"].roof.tiles == (6, 2)


def test_a_function_that_is_not_called_keeps_its_bindings(run, house):
    assert run(SMALLEST + "house.build.paint = @house.paint\n")["paint"] is house.paint
    painted = run(SMALLEST + "house.build.paint = @house.paint\nhouse.paint.coats = 5\n")["paint"]
    assert isinstance(painted, functools.partial)
    assert painted("red") == ("red", 5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=castle", {"name": "castle"}),
        ("name=runs/a=b", {"name": "runs/a=b"}),
        ("size=3", {"size": 3}),
        ("room.width=11", {"room": 11}),
    ],
)
def test_override(run, override, expected):
    given = run(SMALLEST, override)
    (name, value), *_ = expected.items()
    assert (given["room"].width if name == "room" else given[name]) == value


def test_override_of_an_unbound_configuration_starts_from_its_default(run, house):
    given = run(SMALLEST, "roof.slope=0.75", "guest.width=8", "room.roof.slope=0.5")
    assert given["roof"] == house.Roof(slope=0.75, tiles=(7, 8))
    assert given["guest"].width == 8
    assert given["room"] == house.Room(width=2, roof=house.Roof(slope=0.5))


def test_override_in_an_item_of_a_dict(run, house):
    text = SMALLEST + "house.build.rooms = {'x': @house.Room(), 'y': @other/house.Room()}\n"
    text += "other/house.Room.height = 9\n"
    rooms = run(text, "rooms.y.width=7", "rooms.y.roof.slope=0.125")["rooms"]
    assert rooms["x"] == house.Room(width=2)
    assert rooms["y"] == house.Room(width=7, height=9, roof=house.Roof(slope=0.125))
    with pytest.raises(InputError, match=r"rooms.z: given 'z', expected one of x, y"):
        run(text, "rooms.z.width=7")


def test_override_of_what_a_function_is_called_with(run):
    text = SMALLEST + "house.build.paint = @house.paint\n"
    assert run(text, "paint.coats=5")["paint"]("red") == ("red", 5)
    with pytest.raises(InputError, match=r"--set paint.coat=5: paint.coat: .*closest is 'coats'"):
        run(text, "paint.coat=5")


def test_override_of_a_macro_reaches_all_that_mention_it(run):
    text = SMALLEST + "WIDTH = 3\nhouse.Room.width = %WIDTH\nhouse.build.name = %NAME\nNAME = 'a'\n"
    given = run(text, "WIDTH=9", "NAME=b")
    assert (given["room"].width, given["name"]) == (9, "b")
    with pytest.raises(InputError, match=r"--set WDITH=9: .*'WDITH'"):
        run(text, "WDITH=9")


def test_a_macro_and_a_reference_that_a_later_binding_replaced_are_no_mistakes(run):
    text = (
        SMALLEST
        + "WIDTH = 3\nhouse.Room.width = %WIDTH\n"
        + "house.Room.roof = @house.Roof()\nhouse.Roof.slope = 1\n"
    )
    given = run(text + "house.Room.roof = None\n", "room.width=4")
    assert (given["room"].width, given["room"].roof) == (4, None)


def test_what_another_verb_binds_is_no_mistake(run, house):
    house.demolish = lambda *, room, force=1: None
    assert run(SMALLEST + "house.demolish.force = 2\n")["room"].width == 2


def test_override_in_a_scope(run):
    text = SMALLEST + "house.build.guest = @guest/house.Room()\n"
    assert run(text, "guest.width=9")["room"].width == 2
    given = run(text, "guest/room.width=9")
    assert (given["room"].width, given["guest"].width) == (2, 9)
    with pytest.raises(InputError, match="closest is 'guest'"):
        run(text, "gest/room.width=9")


def test_the_operative_configuration_repeats_the_run(run, tmp_path, house):
    text = (
        SMALLEST
        + """
SLOPES = (0.5, 1)
house.build.guest = @a/b/house.Room()
a/b/house.Room.width = 1
house.build.rooms = {'x': @a/b/house.Room()}
house.Room.roof = @house.Roof()
house.Roof.tiles = (%ONE,)
ONE = 1
house.build.paint = @house.paint
house.paint.coats = %SLOPES
"""
    )
    first = run(
        text,
        f"size={-math.inf!r}".replace("inf", "1e999"),
        "roof.slope=0.75",
        'name=it\'s "here"\\n',
    )
    second = run(first["text"], name="again.gin")
    assert second["text"] == first["text"]
    assert "house.Room.height = 3" in first["text"], "defaults are written out"
    assert second.pop("paint")("red") == first.pop("paint")("red")
    assert second == first
    assert run(first["text"], "room.width=20", name="again.gin")["room"].width == 20


def test_the_operative_configuration_holds_the_defaults(run):
    text = run(SMALLEST)["text"]
    assert "house.build.roof = @build/roof/house.Roof()" in text
    assert "build/roof/house.Roof.tiles = (7, 8)" in text
    assert run(text, name="again.gin")["roof"].tiles == (7, 8)
    assert run(text, "roof.slope=0.75", name="again.gin")["roof"].slope == 0.75


def test_nothing_outlives_a_call(run):
    run(SMALLEST + "house.Room.height = 8\n", "name=x")
    assert config.operative_config() == ""
    given = run(SMALLEST)
    assert (given["room"].height, given["name"]) == (3, "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("house.Room.widht = 1", r"a\.gin:5: Room\.widht: .*closest is 'width'"),
        ("house.Rom.width = 1", r"a\.gin:5: house\.Rom: .*closest is 'Room'"),
        ("hose.Room.width = 1", r"a\.gin:5: hose\.Room: .*closest is 'house'"),
        (
            "WIDHT = 1\nWIDTH = 2\nhouse.Room.width = %WIDTH",
            r"a\.gin:5: WIDHT: .* mentions: .*closest is 'WIDTH'",
        ),
        (
            "house.Shed.size = 2",
            r"a\.gin:5: Shed\.size: given '2', expected also `@house\.Shed\(\)`: nothing builds",
        ),
        ("house.paint.coats = 5", r"a\.gin:5: paint\.coats: .*@house\.paint"),
        ("house.build.guest = @house.Rooom()", r"a\.gin:5: house\.Rooom: .*closest is 'Room'"),
        ("house.build.gest = None", r"a\.gin:5: build\.gest: .*closest is 'guest'"),
        (
            "gest/house.Room.width = 1\nhouse.build.guest = @guest/house.Room()",
            r"a\.gin:5: .*closest is 'guest'",
        ),
        (
            "house.WALLS.height = 1",
            r"a\.gin:5: house\.WALLS: given 4, expected a function or a class",
        ),
        (
            "house.Room.width = '2'",
            r"a\.gin:5: Room\.width: given '2', expected a value of type int",
        ),
        (
            "house.build.size = '2'",
            r"a\.gin:5: build\.size: given '2', expected a value of type float",
        ),
        (
            "house.build.room = @house.Roof()",
            r"a\.gin:5: build\.room: given Roof.*expected a value of type Room",
        ),
        ("house.Room.width = %gin.REQUIRED", r"a\.gin:5: Room\.width: .*REQUIRED.*--set"),
        ("house.Room.width = %W\nWIDTH = 3\n", r"a\.gin:5: Room\.width: %W: .*WIDTH"),
        ("house.Room.width = %W\nW = %W\n", r"a\.gin:5: Room\.width: %W"),
        (
            "house.Room.width = = 3",
            r"a\.gin:5: given 'house\.Room\.width = = 3', expected gin syntax",
        ),
        ("house.Room.width = (1,", r"a\.gin:\d: given .*, expected gin syntax"),
        ("  house.Room.width 3", r"a\.gin:5: given .*expected gin syntax"),
        ("import hosue", r"a\.gin:5: import: given 'hosue', expected an importable module"),
        ("include '.'", r"a\.gin:5: include: .*a gin file; this is a folder"),
        ("include 'b.gin'", r"a\.gin:5: include: given '.*b\.gin', expected an existing gin file"),
    ],
)
def test_a_mistake_names_the_file_the_line_and_the_closest_name(run, line, message):
    with pytest.raises(InputError, match=message):
        run(SMALLEST + line + "\n")


def test_an_error_of_a_constructor_comes_out_as_it_was_raised(run):
    with pytest.raises(InputError) as caught:
        run(SMALLEST + "house.build.roof = @house.Roof()\nhouse.Roof.slope = 2\n")
    assert str(caught.value) == "Roof.slope: given 2, expected at most 1"
    assert type(caught.value) is InputError


def test_missing_values_are_named(run, load, house):
    for text in (HEADER, HEADER + "house.build.room = @house.Room()\n"):
        with pytest.raises(InputError, match=r"Room\.width: .*each of width in a gin file or by -"):
            run(text)
    house.demolish = lambda *, force: None
    house.demolish.__qualname__ = "demolish"
    with pytest.raises(InputError, match=r"<lambda>\.force: .*binds are house\.build$"):
        load(house.demolish, SMALLEST)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rom.width=3", "closest is 'room'"),
        ("room.widht=3", "--set room.widht=3: Room.widht: .*closest is 'width'"),
        (
            "room.width=wide",
            "--set room.width=wide: Room.width: given 'wide', expected a value of type int",
        ),
        ("room.width.x=3", "width: given '2', expected a configuration that has fields"),
        ("rooms.w.width=3", r"rooms.w: given 'w', expected one of x"),
        ("room.width", "--set: given 'room.width', expected NAME.FIELD=VALUE or FIELD=VALUE"),
        ("=3", "expected NAME.FIELD=VALUE"),
        ("room=@house.Room()", "expected a Python literal or plain text"),
    ],
)
def test_a_mistake_in_an_override_is_named(run, override, message):
    with pytest.raises(InputError, match=message):
        run(SMALLEST + "house.build.rooms = {'x': @house.Room()}\n", override)


def test_files_that_cannot_be_read(house, tmp_path, run):
    (tmp_path / "base.gin").write_text("")
    with pytest.raises(
        InputError, match=r"bse\.gin', expected an existing gin file; closest is 'base\.gin'"
    ):
        config.run(house.build, [tmp_path / "bse.gin"])
    with pytest.raises(InputError, match="expected a gin file; this is a folder"):
        config.run(house.build, [tmp_path])
    (tmp_path / "binary.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected UTF-8 text"):
        config.run(house.build, [tmp_path / "binary.gin"])
    with pytest.raises(InputError, match="dynamic_registration` as the file's first line"):
        run("import house\nhouse.Room.width = 1\n")


def test_a_module_that_fails_to_import_a_dependency_is_not_blamed_on_the_file(run, tmp_path):
    (tmp_path / "shed.py").write_text("import a_dependency_that_is_absent\n")
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_absent"):
        run(HEADER + "import shed\n")


def test_gin_itself_reads_the_same_file(run, house, tmp_path):
    text = SMALLEST + "house.Room.roof = @steep/house.Roof()\nsteep/house.Roof.slope = 1.0\n"
    given = run(text)
    program = f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        import gin, house
        gin.parse_config_file({str(tmp_path / "a.gin")!r})
        print(gin.get_configurable(house.build)()["room"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(given["room"])
