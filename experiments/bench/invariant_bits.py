"""Whether log-probabilities have the same bits alone, in a batch, from the cache, in training.

Two layers in a shape that our kernels take, with the strategy BatchInvariant. Each line says how
many of the new tokens' log-probabilities are those of the sequence alone, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from decode import draw_params

from jaxscale.models.by_row import are_ends_by_row
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import BatchInvariant, ExecutionConfig
from jaxscale.models.losses import token_log_probabilities
from jaxscale.ops.precision import Policy
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import RequestConfig

NEW = 8
MODEL = from_flat(
    vocab_size=4160,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    ffn_dim=1024,
    max_length=1024,
    num_layers=2,
    windows=(None, 70),
)
EXECUTION = ExecutionConfig(strategy=BatchInvariant())
DECODER = Decoder(MODEL, EXECUTION.operations(), Policy(parameters="bfloat16"), EXECUTION)


@functools.partial(jax.jit, static_argnums=2)
def trained(params, tokens, length):
    """Log-probabilities of the next tokens of rows, beside the sum of the gradient's sizes."""
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    batch = {"tokens": tokens, "positions": positions}

    def loss(params):
        x, _, _ = DECODER.run_layers(params, DECODER.embed(params, batch), DECODER.tokens(batch))
        found = token_log_probabilities(DECODER, params, x, jnp.roll(tokens, -1, 1))
        return found.sum(), found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return found, sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(gradient))


def report(name, found, alone):
    """One line."""
    same = sum(a == b for one, other in zip(found, alone, strict=True) for a, b in zip(one, other))
    print(f"| {name} | {same} of {NEW * len(alone)} |", flush=True)


def main():
    params, rng = draw_params(MODEL), np.random.default_rng(0)
    long = rng.integers(0, MODEL.vocab_size, 600).tolist()
    prompts = [long, [*long[:130], 5, 6], [3], long[:64], [9] * 70]
    sizes = dict(token_budget=256, max_sequences=8, max_prompts=8, num_blocks=60)
    config = EngineConfig(**sizes, steps_a_launch=2)  # of loops one is compiled, not three
    engine = Engine(DECODER, params, config=config)
    asked = RequestConfig(max_new_tokens=NEW, num_logprobs=0)

    def drawn(prompts):
        found = [one for (one,) in engine.generate(prompts, asked)]
        return found, [[each.drawn for each in one.logprobs] for one in found]

    one_by_one = [drawn([prompt]) for prompt in prompts]
    tokens, alone = [one.tokens for (one,), _ in one_by_one], [bits for _, (bits,) in one_by_one]
    print(f"{jax.devices()[0].device_kind}, by kernels: {are_ends_by_row(DECODER)}\n")
    print("| where | the same bits |\n|---|---|")
    report("from cached prefixes, in one batch", drawn(prompts)[1], alone)
    engine.swap(params)  # which forgets what is cached
    report("in one batch, prompts split", drawn(prompts)[1], alone)
    texts = [prompt + new for prompt, new in zip(prompts, tokens, strict=True)]
    length = max(map(len, texts))
    rows, _ = trained(params, jnp.asarray([t + [0] * (length - len(t)) for t in texts]), length)
    places = [slice(len(prompt) - 1, len(prompt) - 1 + NEW) for prompt in prompts]
    report("in a training step", [np.asarray(row)[p] for row, p in zip(rows, places)], alone)


if __name__ == "__main__":
    main()
