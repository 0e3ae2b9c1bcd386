"""Many clients over HTTP, of which some go, some ask for too much and some are wrong.

python -m tests.serve.http_load 10000   # so many requests; prints what came of them
"""

import asyncio
import collections
import contextlib
import json
import random
import resource
import sys
import time

import httpx
import jax

from tests.serve.test_server import running

NUM_CLIENTS = 24
TIMEOUT_S = 300  # of a request: one that takes longer hangs


async def ask(client, rng):
    """One request; what came of it."""
    fields = dict(
        model="tiny",
        prompt="".join(rng.choice("ab ") for _ in range(rng.choice([1, 5, 20, 60]))),
        max_tokens=rng.choice([1, 4, 12]),
        n=rng.choice([1, 1, 1, 3]),
        temperature=rng.choice([0, 1]),
        stream=rng.random() < 0.5,
        ignore_eos=True,
    )
    kind = rng.choices(["whole", "leaves", "too long", "wrong"], [80, 10, 5, 5])[0]
    if kind == "too long":
        fields["prompt"] = "a" * rng.choice([129, 1000, 100_000])
    if kind == "wrong":
        fields |= rng.choice([{"model": "other"}, {"top_p": 0}, {"n": 0}, {"prompt": 7}])
    if kind == "leaves":
        fields |= {"max_tokens": 60, "n": rng.choice([1, 5])}
        return await leave(client, fields, rng)
    response = await client.post("/v1/completions", json=fields, timeout=TIMEOUT_S)
    if kind != "whole":
        assert response.status_code in (400, 404), response.text
        assert response.json()["error"]["message"]
        return kind
    assert response.status_code == 200, response.text
    wanted = fields["n"] * ["length"]
    if fields["stream"]:
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        assert ends == wanted
        return "streamed"
    found = response.json()
    assert [choice["finish_reason"] for choice in found["choices"]] == wanted
    assert found["usage"]["completion_tokens"] == fields["n"] * fields["max_tokens"]
    return "whole"


async def leave(client, fields, rng):
    """A client that goes before its answer ends: while it waits, or in the middle of a stream."""
    limit = rng.choice([0.001, 0.05, TIMEOUT_S])
    with contextlib.suppress(httpx.TimeoutException):
        async with client.stream("POST", "/v1/completions", json=fields, timeout=limit) as response:
            async for _ in response.aiter_bytes():
                break
    return "left"


async def run(address, num_requests, seed):
    """What came of each kind of request."""
    rng, found, left = random.Random(seed), collections.Counter(), num_requests
    limits = httpx.Limits(max_connections=NUM_CLIENTS)

    async def one_after_the_other(client):
        nonlocal left
        while left:
            left -= 1
            found[await ask(client, rng)] += 1

    async with httpx.AsyncClient(base_url=address, limits=limits) as client:
        await asyncio.gather(*(one_after_the_other(client) for _ in range(NUM_CLIENTS)))
    return found


def check_nothing_is_left(engine):
    """Waits for what clients left behind to end, which is at once."""
    for _ in range(500):
        figures = engine.figures()
        if not (figures.num_held or figures.num_running or figures.num_waiting):
            break
        time.sleep(0.02)
    assert (figures.num_held, figures.num_running, figures.num_waiting) == (0, 0, 0), figures
    assert not engine._collector.members
    assert not engine._collector.num_open


def memory():
    """(bytes of arrays of JAX, MiB of the process at most)."""
    arrays = sum(array.nbytes for array in jax.live_arrays())
    return arrays, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(num_requests):
    """The counts of each kind; raises if a request is lost or hangs, or something is left."""
    with running() as (address, engine):
        asyncio.run(run(address, 200, seed=0))  # what is compiled stays
        check_nothing_is_left(engine)
        arrays, peak_mib = memory()
        began = time.perf_counter()
        found = asyncio.run(run(address, num_requests, seed=1))
        check_nothing_is_left(engine)
        assert sum(found.values()) == num_requests
        arrays_after, peak_after_mib = memory()
        assert arrays_after <= arrays
        found |= {
            "seconds": round(time.perf_counter() - began),
            "MiB at most before": round(peak_mib),
            "MiB at most after": round(peak_after_mib),
        }
        return found


if __name__ == "__main__":
    for name, value in measure(int(sys.argv[1])).items():
        print(f"| {name} | {value} |", flush=True)
