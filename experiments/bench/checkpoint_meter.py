"""Seconds and peak host memory of what runs within, for the benchmarks of checkpoints."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SAVED_AT = 3


def stall(name: str, step: Callable, save: Callable, num_steps: int) -> None:
    """Prints what a save before one of several steps costs them, beside as many without one.

    Steps without a save vary too, so that the same sums of theirs are printed beside.

    Args:
        name: of what saves.
        step: does one step and waits for it.
        save: starts a save.
        num_steps: how many steps, of which the fourth comes after the save.
    """
    without = _run(step, num_steps)
    usual = float(np.median(without))
    noise = [1e3 * (seconds - usual) for seconds in without[SAVED_AT:]]
    calls: list[float] = []

    def timed():
        began = time.perf_counter()
        save()
        calls.append(time.perf_counter() - began)

    lost = [1e3 * (seconds - usual) for seconds in _run(step, num_steps, timed)[SAVED_AT:]]
    print(
        f"{name:<46} call {1e3 * calls[0]:.1f} ms, its step {lost[0]:+.1f} ms, worst after it "
        f"{max(lost[1:]):+.1f} ms, all {sum(lost):+.1f} ms (step {1e3 * usual:.1f} ms; without a "
        f"save worst {max(noise):+.1f} ms, all {sum(noise):+.1f} ms)",
        flush=True,
    )


def _run(step: Callable, num_steps: int, save: Callable = lambda: None) -> list[float]:
    seconds = []
    for number in range(num_steps):
        began = time.perf_counter()
        if number == SAVED_AT:
            save()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


class Meter:
    """Seconds, those of all cores, and the largest resident memory of what runs within."""

    def __enter__(self):
        self._is_done = threading.Event()
        self.rest = self.peak = resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._began[0]
        self.core_seconds = time.process_time() - self._began[1]
        self._is_done.set()
        self._thread.join()

    def _watch(self):
        while not self._is_done.wait(0.005):
            self.peak = max(self.peak, resident())


def resident() -> float:
    """GiB of this process in memory, without files that are mapped."""
    sizes = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, size = line.partition(":")
        sizes[name] = size
    own = [int(sizes[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in sizes]
    return sum(own or [int(sizes["VmRSS"].split()[0])]) / 2**20


@contextlib.contextmanager
def measured(name: str):
    with Meter() as meter:
        yield meter
    memory = f"host +{meter.peak - meter.rest:6.2f} GiB over {meter.rest:5.2f}"
    seconds = f"{meter.seconds:8.3f} s, of cores {meter.core_seconds:8.3f} s"
    print(f"{name:<46} {seconds}   {memory}", flush=True)
