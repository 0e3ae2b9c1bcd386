"""Seconds in which a model in training is spread and writes, by the devices of each copy.

A row says how many devices wrote; the first is the first device alone. The first texts compile and
are not counted. Random weights and prompts.

python experiments/bench/rollouts.py experiments/configs/runs/llama_1b.gin --set mesh.data=2 \\
    --set mesh.zero=3
"""

import functools
import json
import statistics
import time

import jax
import numpy as np
from gin_run import devices, make_parser, start_run

from jaxscale.launch.memory import bytes_on_one_device
from jaxscale.models.parameters import init_params
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.train.setup import make_region
from jaxscale.train.state import stored_params


def timed(f, *arguments, **settings):
    """(seconds, result)."""
    began = time.perf_counter()
    result = jax.block_until_ready(f(*arguments, **settings))
    return time.perf_counter() - began, result


def measure(engine, params, options, vocab_size):
    """Figures of one way to write."""
    shape = options.prompts, options.length
    prompts = np.random.default_rng(0).integers(0, vocab_size, shape).tolist()
    settings = dict(sampling=SamplingConfig(), max_new_tokens=options.new)
    rounds = []
    for _ in range(1 + options.rounds):
        spread_s, spread = timed(engine.spread, params)
        write_s, _ = timed(engine.write, spread, prompts, **settings)
        del spread
        rounds.append((spread_s, write_s))
    spread_s, write_s = map(statistics.median, zip(*rounds[1:], strict=True))
    tokens_per_s = options.prompts * options.new / write_s
    copy_gib = bytes_on_one_device(engine.abstract) / 2**30
    return dict(spread_s=spread_s, write_s=write_s, tokens_per_s=tokens_per_s, copy_gib=copy_gib)


def drawn(run, region):
    """Random parameters, as a training on the region's mesh stores them."""
    stored = stored_params(run.table(), region.mesh, region.specs, run.policy.parameters)
    draw = functools.partial(init_params, run.table(), dtype=run.policy.parameters)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, stored)
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(0))


def main():
    """Print a line of JSON for each."""
    parser = make_parser(__doc__)
    for name, default in dict(prompts=256, length=128, new=256, rounds=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    table, num = run.table(), jax.device_count()
    ways = {(num, tensor): run.mesh for tensor in range(1, num + 1) if num % tensor == 0}
    for (num_writing, tensor), mesh in {(1, 1): MeshConfig(), **ways}.items():
        region = make_region(
            table=table,
            mesh=mesh,
            train=run.train,
            policy=run.policy,
            devices=jax.devices()[:num_writing],
        )
        engine = HybridEngine(run.model, run.policy, region, tensor, "tensor")
        found = measure(engine, drawn(run, region), options, run.model.vocab_size)
        print(json.dumps(dict(num_writing=num_writing, tensor=tensor, **found) | devices()))


if __name__ == "__main__":
    main()
