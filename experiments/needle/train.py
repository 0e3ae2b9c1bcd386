"""Train a small model in chunks to find needles in long noise; a heat map of what it finds.

A row is noise in which pairs of a key and a value are hidden at random depths. At its end every key
comes again, and the token after it must be the value that it had. Only those tokens count. The
length doubles from stage to stage, and the rows of a batch halve.

python experiments/needle/train.py --output runs/needle --longest 131072
python experiments/needle/train.py --output runs/needle --longest 512 --steps 20 --dim 32  # a CPU
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined

NUM_PAIRS, NUM_KEYS, NUM_NOISE, NUM_DEPTHS = 32, 64, 128, 8
VOCABULARY = 2 * NUM_KEYS + NUM_NOISE


def draw_rows(rng, rows, length):
    """(tokens [rows, length + 1], depth of each answer's needle in 0..1 [rows, NUM_PAIRS])."""
    body = length + 1 - 2 * NUM_PAIRS
    tokens = rng.integers(2 * NUM_KEYS, VOCABULARY, (rows, length + 1), np.int32)
    depths = np.zeros((rows, NUM_PAIRS))
    for row in range(rows):
        keys = rng.permutation(NUM_KEYS)[:NUM_PAIRS]
        values = NUM_KEYS + rng.integers(0, NUM_KEYS, NUM_PAIRS)
        places = 2 * np.sort(rng.permutation(body // 2)[:NUM_PAIRS])
        tokens[row, places], tokens[row, places + 1] = keys, values
        order = rng.permutation(NUM_PAIRS)
        tokens[row, body::2], tokens[row, body + 1 :: 2] = keys[order], values[order]
        depths[row] = places[order] / body
    return tokens, depths


def make_batch(tokens):
    """Only the values that follow a key at the end count."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    weights = np.zeros((rows, length), np.float32)
    weights[:, length - 2 * NUM_PAIRS :: 2] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return dict(tokens=tokens[:, :-1], labels=tokens[:, 1:], weights=weights, positions=positions)


def make_step(model, execution, policy, optimizer):
    """(params, state, batch) -> (params, state, mean loss), compiled."""
    loss_fn = NextTokenLoss(model, policy, execution)

    def mean(params, batch):
        total, weight, _ = loss_fn(params, batch, None)
        return total / weight

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(mean)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def accuracy(model, execution, policy, params, rng, rows, length, repeats=4):
    """The share of answers that are right, by depth, [NUM_DEPTHS]."""
    decoder = Decoder(model, execution.operations(), policy, execution)

    @jax.jit
    def answers(params, batch):
        x = decoder.embed(params, batch)
        x, _, _ = decoder.run_layers(params, x, decoder.tokens(batch))
        logits = decoder.unembed(params, decoder.hidden(params, x[:, -2 * NUM_PAIRS :]))
        return jnp.argmax(logits[:, ::2], -1)

    right, seen = np.zeros(NUM_DEPTHS), np.zeros(NUM_DEPTHS)
    for _ in range(repeats):
        tokens, depths = draw_rows(rng, rows, length)
        batch = make_batch(tokens)
        is_right = np.asarray(answers(params, batch)) == batch["labels"][:, -2 * NUM_PAIRS :: 2]
        number = np.minimum((depths * NUM_DEPTHS).astype(int), NUM_DEPTHS - 1)
        np.add.at(right, number, is_right)
        np.add.at(seen, number, 1)
    return right / np.maximum(seen, 1)


def draw_picture(found, path):
    """Depth upwards, length to the right."""
    figure, axis = plt.subplots(figsize=(6, 4))
    table = np.array(list(found.values())).T
    image = axis.imshow(table, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(found)), [f"{length:,}" for length in found])
    axis.set_yticks(range(NUM_DEPTHS), [f"{i / NUM_DEPTHS:.0%}" for i in range(NUM_DEPTHS)])
    axis.set_xlabel("tokens")
    axis.set_ylabel("depth of the needle")
    figure.colorbar(image, label="answers that are right")
    figure.savefig(path, bbox_inches="tight", dpi=120)


def main():
    """Train from stage to stage, then look at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shortest", type=int, default=512)
    parser.add_argument("--longest", type=int, default=131_072)
    parser.add_argument("--factor", type=int, default=4, help="from stage to stage")
    parser.add_argument("--steps", type=int, default=1200, help="of the first stage")
    parser.add_argument("--dim", type=int, default=256)
    options = parser.parse_args()
    heads = dict(num_heads=options.dim // 64 or 1, num_kv_heads=1, head_dim=min(64, options.dim))
    model = from_flat(
        vocab_size=VOCABULARY,
        num_layers=2,
        model_dim=options.dim,
        ffn_dim=2 * options.dim,
        max_length=options.longest,
        rope_theta=1e7,
        **heads,
    )
    is_gpu = jax.default_backend() == "gpu"
    policy = Policy(compute="bfloat16" if is_gpu else "float32")
    optimizer = optax.adam(1e-3, b2=0.95)
    params = init_params(parameter_table(model), jax.random.key(0), "float32")
    state, rng, found, length, steps = optimizer.init(params), np.random.default_rng(0), {}, 0, 0
    while length < options.longest:
        length = min(length * options.factor or options.shortest, options.longest)
        steps = max(steps // 4, 50) if steps else options.steps
        rows = max(16 * options.shortest // length, 1)
        strategy = FullyPipelined(chunk_tokens=length // 4)
        execution = ExecutionConfig(remat="none", num_loss_chunks=8, strategy=strategy)
        step = make_step(model, execution, policy, optimizer)
        for number in range(steps):
            tokens, _ = draw_rows(rng, rows, length)
            params, state, loss = step(params, state, make_batch(tokens))
            if number % 100 == 0:
                print(f"{length:>8,} tokens, step {number}: loss {float(loss):.3f}", flush=True)
        found[length] = accuracy(model, execution, policy, params, rng, rows, length)
        print(f"{length:>8,} tokens: {found[length].mean():.3f} of the answers are right")
    options.output.mkdir(parents=True, exist_ok=True)
    draw_picture(found, options.output / "needle.png")
    table = {length: list(row) for length, row in found.items()}
    (options.output / "needle.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main()
