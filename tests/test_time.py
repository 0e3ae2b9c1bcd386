"""The rooms' time budgets: complete, within what `make test` may take, and judged fairly."""

from pathlib import Path

import pytest

from tests.room_clock import MAX_SLOWDOWN, Budgets, judge, room_of, time_workload

TESTS = Path(__file__).parent
NUM_WORKERS = 2
# What `make test` may take on two cores, as the README says. It takes about half of it.
RUN_S = 720
# Starting the workers and collecting take 20 s, and one worker may end before the other.
OVERHEAD_S = 30
BUDGETS = Budgets(sample_s=0.01, rooms={"ops": 100.0, "data": 10.0})


def test_every_room_has_a_budget():
    files = [path.relative_to(TESTS.parent) for path in TESTS.rglob("test_*.py")]
    assert {room_of(path.as_posix()) for path in files} == Budgets.read().rooms.keys()


def test_the_budgets_fit_into_the_time_of_a_run():
    total = sum(Budgets.read().rooms.values())
    assert total <= NUM_WORKERS * (RUN_S - OVERHEAD_S)


@pytest.mark.parametrize(
    ("test_id", "room"),
    [
        ("tests/ops/test_norm.py::test_x[1/2]", "ops"),
        ("tests/parallel/pipeline/test_stages.py::test_x", "parallel"),
        ("tests/test_cli.py::test_x", "tests"),
    ],
)
def test_a_room_is_the_first_folder(test_id, room):
    assert room_of(test_id) == room


@pytest.mark.parametrize(
    ("seconds", "sample_s", "over"),
    [
        ({"ops": 99, "data": 9}, 0.01, []),
        ({"ops": 101, "data": 9}, 0.01, ["ops"]),
        ({"ops": 199, "data": 21}, 0.02, ["data"]),
        ({"ops": 99, "data": 11}, 0.005, ["data"]),
        ({"ops": 1000, "data": 1000}, 0.01 * MAX_SLOWDOWN + 0.001, []),
        ({"serve": 1}, 0.01, ["serve"]),
    ],
    ids=["within", "over", "slow machine", "fast machine", "overloaded machine", "no budget"],
)
def test_a_room_is_judged_at_the_machines_own_speed(seconds, sample_s, over):
    comparison = judge(seconds, [sample_s / 2, sample_s * 3 / 2], BUDGETS)
    assert comparison.over == over
    table = "\n".join(comparison.lines)
    assert all(room in table for room in seconds)


def test_the_workload_takes_long_enough_to_be_timed():
    assert 0.001 < min(time_workload() for _ in range(5)) < 1
