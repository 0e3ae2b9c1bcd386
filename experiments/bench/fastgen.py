"""FastGen's benchmark in one process: clients in a closed loop, splitfuse beside prefill_first.

Lengths Normal(mean, 0.3 mean). A request meets the SLA m if its first token, and on average every
further one, takes at most m times as long as with one client (arXiv 2401.08671, section 4).
"""

import argparse
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


def measure(engine, work, num_clients):
    """Requests/s, and [first token, mean of the others, 95 % of them] seconds of each request."""
    waiting, times, num_open, began = list(work), {}, 0, time.perf_counter()
    while waiting or num_open:
        while waiting and num_open < num_clients:
            prompt, new = waiting.pop()
            request = engine.add(prompt, RequestConfig(GREEDY, max_new_tokens=new))
            times[request], num_open = [time.perf_counter()], num_open + 1
        for delta in engine.step():
            times[delta.request].append(time.perf_counter())
            num_open -= delta.finish_reason is not None
    gaps = [np.diff(each) for each in times.values()]
    figures = np.array([(g[0], g[1:].mean(), np.quantile(g[1:], 0.95)) for g in gaps])
    return len(work) / (time.perf_counter() - began), figures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lengths", type=int, nargs=2, default=(2600, 128))
    options, rng = parser.parse_args(), np.random.default_rng(0)
    model = make_model((TINY if options.tiny else FULL).shape)
    budget, most, count = (32, 8, 6) if options.tiny else (768, 512, 128)
    sizes = np.clip(rng.normal(1, 0.3, (count, 2)), 0.1, 1.4) * options.lengths
    work = [([1 + i] * int(p), 4 + int(n)) for i, (p, n) in enumerate(sizes)]
    print("| policy | clients | requests/s | effective at SLA 2 | 3 | 5 | P95 of tokens, ms |")
    for policy in ("splitfuse", "prefill_first"):
        sizes = dict(token_budget=budget, max_sequences=most, use_prefix_cache=False)
        config = EngineConfig(**sizes, policy=policy)
        engine = Engine(Decoder(model, policy=BFLOAT16), draw_params(model), config=config)
        measure(engine, work, most)  # compiles
        alone = np.median(measure(engine, work[:8], 1)[1], 0)
        for num_clients in CLIENTS[: 3 if options.tiny else None]:
            rate, figures = measure(engine, work, num_clients)
            met = [rate * (figures <= m * alone)[:, :2].all(1).mean() for m in (2, 3, 5)]
            cells = [rate, *met, 1e3 * np.quantile(figures[:, 2], 0.95)]
            print(f"| {policy} | {num_clients} |", *(f"{cell:.2f} |" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
