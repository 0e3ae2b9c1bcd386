"""FastGen's benchmark in one process: clients in a closed loop, splitfuse beside prefill_first.

Lengths Normal(mean, 0.3 mean). A request meets the SLA m if its first token, and on average every
further one, takes at most m times as long as with one client of splitfuse (arXiv 2401.08671,
section 4). Each point is a line of JSON; `fastgen_draw.py` makes tables and pictures of them.
"""

import argparse
import json
import time

import numpy as np
from decode import BFLOAT16, draw_params, make_model
from decode_work import FULL, TINY

from jaxscale.models.decoder import Decoder
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sampling import SamplingConfig

GREEDY, CLIENTS = SamplingConfig(temperature=0), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FEW = 32  # requests of a point with at most two clients; of others 128


def measure(engine, work, num_clients):
    """(seconds of all, [times at which a request was sent and its tokens came])."""
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


def figures(seconds, gaps, alone):
    """A point's figures; `alone` is (first token, further ones) in seconds with one client."""
    first, further = np.array([(gap[0], gap[1:].mean()) for gap in gaps]).T
    rate = len(gaps) / seconds
    alone = alone or (float(np.median(first)), float(np.median(further)))
    met = {m: ((first <= m * alone[0]) & (further <= m * alone[1])).mean() for m in (2, 3, 5)}
    quantile = np.quantile(np.concatenate([gap[1:] for gap in gaps]), 0.95)
    return alone, {
        "requests_per_s": rate,
        "first_token_ms": 1e3 * np.median(first),
        "token_ms": 1e3 * np.median(further),
        "token_p95_ms": 1e3 * quantile,
        **{f"effective_at_{m}": rate * share for m, share in met.items()},
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
    sizes |= dict(token_budget=32, max_sequences=8) if options.tiny else {}
    count, alone = 6 if options.tiny else 128, None
    lengths = np.clip(rng.normal(1, 0.3, (count, 2)), 0.1, 1.4) * options.lengths
    work = [([1 + i] * int(p), 4 + int(n)) for i, (p, n) in enumerate(lengths)]
    for policy in ("splitfuse", "prefill_first"):
        config = EngineConfig(**sizes, policy=policy, use_prefix_cache=False)
        engine = Engine(Decoder(model, policy=BFLOAT16), draw_params(model), config=config)
        for few in (1, 16, count):
            measure(engine, work[: 2 * few], few)  # compiles
        for clients in options.clients[: 3 if options.tiny else None]:
            some = work[: FEW if clients <= 2 else None]
            alone, found = figures(*measure(engine, some, clients), alone)
            found = {name: round(value, 3) for name, value in found.items()}
            point = dict(policy=policy, lengths=options.lengths, clients=clients)
            print(json.dumps(point | found), flush=True)
        del engine


if __name__ == "__main__":
    main()
