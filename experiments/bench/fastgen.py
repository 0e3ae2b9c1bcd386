"""FastGen's benchmark in one process: clients in a closed loop, splitfuse beside prefill_first.

Lengths Normal(mean, 0.3 mean), every client asks again once its answer has ended. Each point is a
line of JSON with the times of every request; `fastgen_draw.py` tells which of them meet an SLA
(arXiv 2401.08671, section 4), and makes tables and pictures. With one client both policies run the
same steps, which are measured once.
"""

import argparse
import gc
import json
import time

import jax
import numpy as np
from decode import BFLOAT16, draw_params, make_model
from decode_work import FULL, TINY

from jaxscale.models.decoder import Decoder
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sampling import SamplingConfig

GREEDY, CLIENTS = SamplingConfig(temperature=0), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
REQUESTS = 128  # of a point, or one a client
SPAN = 16  # of FastGen's exponential moving average of the time between tokens


def measure(engine, work, num_clients):
    """(seconds of all, [times between a request, its first token and each further one])."""
    waiting, times, num_open, began = list(work), {}, 0, time.perf_counter()
    while waiting or num_open:
        while waiting and num_open < num_clients:
            prompt, new = waiting.pop()
            request = engine.add(prompt, RequestConfig(GREEDY, max_new_tokens=new))
            times[request], num_open = [time.perf_counter()], num_open + 1
        for delta in engine.step():
            times[delta.request].append(time.perf_counter())
            num_open -= delta.finish_reason is not None
    return time.perf_counter() - began, [np.diff(each) for each in times.values()]


def largest_average(gaps):
    """The largest exponential moving average of the times between tokens."""
    average, largest, weight = gaps[0], gaps[0], 2 / (SPAN + 1)
    for gap in gaps[1:]:
        average += weight * (gap - average)
        largest = max(largest, average)
    return largest


def point(seconds, gaps, work):
    """A point's figures, in seconds; lists are by request."""
    further = np.concatenate([gap[1:] for gap in gaps])
    return {
        "requests_per_s": len(gaps) / seconds,
        "token_p95": np.quantile(further, 0.95),
        "token_median": np.median(further),
        "prompt": [len(prompt) for prompt, _ in reversed(work)],
        "first": [round(gap[0], 5) for gap in gaps],
        "whole": [round(gap.sum(), 4) for gap in gaps],
        "average": [round(largest_average(gap[1:]), 6) for gap in gaps],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lengths", type=int, nargs=2, default=(2600, 128))
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--token_budget", type=int, default=768)
    options, rng = parser.parse_args(), np.random.default_rng(0)
    model = make_model((TINY if options.tiny else FULL).shape)
    sizes = dict(token_budget=options.token_budget, max_sequences=512, steps_a_launch=1)
    sizes |= dict(token_budget=32, max_sequences=8, max_prompts=4) if options.tiny else {}
    fewest = 6 if options.tiny else REQUESTS
    count = max(fewest, *options.clients)
    lengths = np.clip(rng.normal(1, 0.3, (count, 2)), 0.1, 1.4) * options.lengths
    work = [([1 + i] * int(p), 4 + int(n)) for i, (p, n) in enumerate(lengths)]
    for policy in ("splitfuse", "prefill_first"):
        config = EngineConfig(**sizes, policy=policy, use_prefix_cache=False)
        engine = Engine(Decoder(model, policy=BFLOAT16), draw_params(model), config=config)
        began = time.perf_counter()
        engine.warm_up()
        gc.collect()
        gc.freeze()  # as the server does: what lives as long as the engine is not looked at again
        compiled = f"compiled in {time.perf_counter() - began:.1f} s"
        print(f"{jax.devices()[0].device_kind}, {policy}: {compiled}, {config}", flush=True)
        for clients in options.clients:
            if clients == 1 and policy != "splitfuse":
                continue
            some = work[: max(fewest, clients)]
            found = point(*measure(engine, some, clients), some)
            head = dict(policy=policy, lengths=options.lengths, clients=clients)
            print(json.dumps(head | found), flush=True)
        del engine


if __name__ == "__main__":
    main()
