"""Greedy decoding on one GPU: jaxscale's `generate_tokens` beside plain JAX (decode_peer.py).

The 1.1B Llama shape, bfloat16, random weights. The peer takes one step per call and issues the
calls without waiting. The rate of ours is that of the decoding alone: the time for one new token,
which is the prompt's, is taken off.

python experiments/bench/decode.py  # --tiny tries it on a CPU
"""

import argparse
import functools
import statistics
import time

import decode_peer as peer
import jax
import jax.numpy as jnp

from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import init_params
from jaxscale.ops.precision import Policy
from jaxscale.serve.generate import generate_tokens
from jaxscale.serve.sampling import SamplingConfig

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--tiny", action="store_true", help="a small shape, for a CPU")
parser.add_argument("--rounds", type=int, default=5, help="timed, after one that compiles")
options = parser.parse_args()
if options.tiny:
    SHAPE = peer.Shape(V=61, L=2, D=16, N=4, K=2, H=4, F=32)
    PROMPT, NUM_PROMPTS, LONG_PROMPT, NUM_NEW = 12, 3, 20, 8
else:
    SHAPE = peer.Shape(V=32064, L=16, D=2048, N=16, K=8, H=128, F=8192)
    PROMPT, NUM_PROMPTS, LONG_PROMPT, NUM_NEW = 172, 64, 1200, 128
MODEL = ModelConfig(
    vocab_size=SHAPE.V,
    num_layers=SHAPE.L,
    model_dim=SHAPE.D,
    num_heads=SHAPE.N,
    num_kv_heads=SHAPE.K,
    head_dim=SHAPE.H,
    ffn_dim=SHAPE.F,
    max_length=4096,
)


def ours(params, prompts, num_new):
    """Seconds in which jaxscale continues the prompts; the new tokens are on the host then."""
    began = time.perf_counter()
    generate_tokens(
        params,
        prompts,
        config=MODEL,
        sampling=SamplingConfig(temperature=0),
        max_new_tokens=num_new,
        policy=Policy(parameters="bfloat16"),
    )
    return time.perf_counter() - began


def plain(weights, caches):
    """(caches, seconds) of NUM_NEW steps; what lies in the caches stands in for a prompt."""
    began = time.perf_counter()
    token, position = jnp.zeros(1, jnp.int32), jnp.int32(PROMPT)
    for _ in range(NUM_NEW):
        caches, token, position = peer.step(weights, caches, token, position, shape=SHAPE)
    jax.block_until_ready(token)
    return caches, time.perf_counter() - began


def main():
    """Time all in turn in each round, so that a slow moment of the machine meets all alike."""
    draw = jax.jit(functools.partial(init_params, MODEL, dtype="bfloat16"))
    params, weights = draw(jax.random.key(0)), peer.draw_weights(SHAPE)
    caches = peer.empty_caches(SHAPE, 1, PROMPT + NUM_NEW)
    prompt, prompts = [[1] * PROMPT], [[1] * LONG_PROMPT] * NUM_PROMPTS
    rounds = []
    for _ in range(1 + options.rounds):
        caches, plain_s = plain(weights, caches)
        decode_s = ours(params, prompt, NUM_NEW) - ours(params, prompt, 1)
        batch_s = ours(params, prompts, NUM_NEW)
        rounds.append((NUM_NEW / plain_s, (NUM_NEW - 1) / decode_s, NUM_PROMPTS / batch_s))
    peer_rate, our_rate, requests = map(statistics.median, zip(*rounds[1:], strict=True))
    print(f"{jax.devices()[0].device_kind}, medians of {options.rounds} rounds\n")
    print("| what | plain JAX | jaxscale | ratio |\n|---|---|---|---|")
    ratio = our_rate / peer_rate
    print(f"| batch 1, tokens/s | {peer_rate:.1f} | {our_rate:.1f} | {ratio:.3f} |")
    batch = f"{NUM_PROMPTS} prompts of {LONG_PROMPT}, {NUM_NEW} new"
    print(f"| {batch}, requests/s | - | {requests:.2f} | - |")


if __name__ == "__main__":
    main()
