"""Thousands of requests with all that goes wrong: none is lost, none hangs, nothing is left."""

import gc
import random

import jax
import pytest

from jaxscale.serve.requests import Penalties, RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.serve.examples import byte_engine


class Load:
    """Requests that arrive at random, of which some are refused and some cancelled."""

    def __init__(self, engine, seed):
        self.engine, self.rng = engine, random.Random(seed)
        self.open, self.ended = {}, {}
        self.num_refused = self.num_cancelled = 0

    def arrive(self):
        rng = self.rng
        prompt = [rng.randrange(4) for _ in range(rng.choice([1, 2, 9, 17, 40, 500]))]
        config = RequestConfig(
            SamplingConfig(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(9)),
            max_new_tokens=rng.choice([1, 2, 5, 12]),
            num_sequences=rng.choice([1, 1, 1, 3]),
            penalties=Penalties(presence=rng.choice([0.0, 0.0, 0.5])),
        )
        try:
            self.open[self.engine.add(prompt, config)] = config
        except InputError:
            self.num_refused += 1

    def step(self):
        if self.rng.random() < 0.1 and self.open:
            request = self.rng.choice(list(self.open))
            self.engine.cancel(request)
            del self.open[request]
            self.num_cancelled += 1
        for delta in self.engine.step():
            assert delta.request in self.open, "a request that has ended draws on"
            ends = self.ended.setdefault(delta.request, set())
            assert delta.index not in ends
            if delta.finish_reason is not None:
                ends.add(delta.index)
            if len(ends) == self.open[delta.request].num_sequences:
                del self.open[delta.request], self.ended[delta.request]

    def run(self, num_requests):
        for number in range(num_requests):
            self.arrive()
            if number % 3 == 0:
                self.step()
            while len(self.open) > 60:
                self.step()
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.step()


@pytest.mark.parametrize(
    ("num_requests", "changes"),
    [
        pytest.param(100, dict(admission="growth", num_blocks=24), id="100, few blocks"),
        pytest.param(10_000, dict(), id="10,000", marks=pytest.mark.long),
    ],
)
def test_none_is_lost_and_nothing_is_left(num_requests, changes):
    engine = byte_engine(**changes)
    load = Load(engine, seed=0)
    load.run(100)  # what is compiled stays
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    load.run(num_requests)
    assert not load.open
    assert not engine.has_work
    assert load.num_refused > num_requests // 20
    assert load.num_cancelled > 10
    figures = engine.figures()
    assert (figures.num_held, figures.num_running, figures.num_waiting) == (0, 0, 0)
    assert not engine._collector.members
    assert not engine._collector.num_open
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) <= before


@pytest.mark.long
def test_clients_over_http_that_go_and_that_are_wrong_leave_nothing():
    pytest.importorskip("uvicorn", reason="the extra `serve`")
    from tests.serve.http_load import measure

    found = measure(300)
    assert found["left"] > 10
    assert found["MiB at most after"] - found["MiB at most before"] < 100
