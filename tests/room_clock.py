"""Time budgets: what each room, a folder of tests, may take in a full run of the default tests.

budgets.json holds the processors' seconds of the tests and of what they start, on two cores. What
else a machine does must not fail a room, and a slower machine must not either: the workers time a
small fixed workload again and again while they run. Its mean time over `sample_s` of budgets.json
is the slowdown by which the measured seconds are divided; a faster machine is judged as it is.
Beyond MAX_SLOWDOWN nothing is judged, nor is a run of only some tests or one with failures.
"""

import collections
import dataclasses
import json
import os
import random
import statistics
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SAMPLE_EVERY_S = 2.0
# A busier machine also slows down what the workload does not do, such as writing to the disk.
MAX_SLOWDOWN = 2.5
# Python's sorting is compiled, branches much and reads all over the memory, as XLA's passes do.
SHUFFLED = random.Random(0).sample(range(20_000), 20_000)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Processor seconds of each room, where the workload of `time_workload` takes `sample_s`."""

    sample_s: float
    rooms: dict[str, float]

    @classmethod
    def read(cls) -> "Budgets":
        return cls(**json.loads((TESTS / "budgets.json").read_text()))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is printed after a run, and the rooms that fail it."""

    lines: list[str]
    over: list[str]


def time_workload() -> float:
    """Processor seconds that the fixed workload takes now."""
    began = time.thread_time()
    sorted(SHUFFLED)
    return time.thread_time() - began


def processor_seconds() -> float:
    """What this process and those that it has waited for have had."""
    return sum(os.times()[:4])


def room_of(test_id: str) -> str:
    """First folder below tests/ that a test stands in; "tests" if it stands in none."""
    _, *folders, _ = test_id.split("::")[0].split("/")
    return folders[0] if folders else "tests"


def judge(seconds: dict[str, float], samples: list[float], budgets: Budgets) -> Comparison:
    """Compares a full run's seconds by room with the budgets, at the machine's own speed."""
    sample_s = statistics.fmean(samples)
    slowdown = max(sample_s / budgets.sample_s, 1.0)
    lines = [f"{'room':<12} {'seconds':>8} {'at budget speed':>16} {'budget':>7}"]
    over = []
    for room, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        spent_then, budget = spent / slowdown, budgets.rooms.get(room, 0)
        is_over = spent_then > budget
        mark = "  over" if is_over else ""
        lines.append(f"{room:<12} {spent:>8.0f} {spent_then:>16.0f} {budget:>7.0f}{mark}")
        over += [room] * is_over
    lines.append(
        f"slowdown {slowdown:.2f}: {len(samples)} samples took {sample_s:.4f} s each, "
        f"{budgets.sample_s} s when the budgets were set"
    )
    if slowdown > MAX_SLOWDOWN:
        lines.append(f"not judged: the slowdown is above {MAX_SLOWDOWN}")
        over = []
    return Comparison(lines, over)


class RoomClock:
    """Plugin that adds up the time of each room and fails a full run in which one takes too long.

    With xdist every process has one: a worker's takes the samples, the controller's judges.
    """

    def __init__(self, config: pytest.Config):
        is_worker = hasattr(config, "workerinput")
        self.takes_samples = is_worker or not config.getoption("numprocesses", None)
        self.seconds = collections.Counter()
        self.samples = []
        self.sampled_at = 0.0
        self.comparison = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Adds up setup, call and teardown."""
        began = processor_seconds()
        try:
            return (yield)
        finally:
            self.seconds[room_of(item.nodeid)] += processor_seconds() - began

    def pytest_runtest_logfinish(self, nodeid):
        """Takes a sample between two tests, so that no test's own time holds it."""
        is_due = time.monotonic() - self.sampled_at > SAMPLE_EVERY_S
        if self.takes_samples and is_due:
            self.samples.append(time_workload())
            self.sampled_at = time.monotonic()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """Takes over what a worker has measured that is done."""
        output = getattr(node, "workeroutput", {})
        self.samples += output.get("samples", [])
        self.seconds.update(output.get("seconds", {}))

    def pytest_sessionfinish(self, session):
        config = session.config
        if hasattr(config, "workeroutput"):
            config.workeroutput["samples"] = self.samples
            config.workeroutput["seconds"] = dict(self.seconds)
        elif is_full_run(session) and self.samples:
            self.comparison = judge(self.seconds, self.samples, Budgets.read())
            if self.comparison.over:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.comparison is None:
            return
        terminalreporter.section("time by room")
        for line in self.comparison.lines:
            terminalreporter.line(line)
        for room in self.comparison.over:
            terminalreporter.line(
                f"{room} is over its budget: make its tests shorter, mark some as long, "
                "or ask for more in tests/budgets.json",
                red=True,
            )


def is_full_run(session: pytest.Session) -> bool:
    """Whether all default tests ran and passed: no paths, no -k, no other -m, nothing left out."""
    config = session.config
    option = config.option
    is_unselected = not (option.keyword or option.deselect or getattr(option, "lf", False))
    return (
        session.exitstatus == pytest.ExitCode.OK
        and config.args_source == pytest.Config.ArgsSource.TESTPATHS
        and option.markexpr in config.getini("addopts")
        and is_unselected
    )
