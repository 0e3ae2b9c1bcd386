"""Train a small model in chunks to find needles in long noise; a heat map of what it finds.

A row is noise, among which lies for every key, at a random depth, a needle: a token that stands for
the key and a random value. At the row's end each key is asked for, and the token after it must be
its value. Only those tokens count. The first stage takes short rows in whole layers, the others
longer and fewer ones in chunks; a stage ends when it finds nearly all, or its time is up.

python experiments/needle/train.py --output runs/needle
python experiments/needle/train.py --output runs/needle --shortest 64 --longest 1024 --tokens 2048
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig, Whole
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined

NUM_KEYS, NUM_VALUES, NUM_NOISE, NUM_DEPTHS = 16, 16, 64, 8
FIRST_KEY = NUM_KEYS * NUM_VALUES  # before it the needles
FIRST_VALUE = FIRST_KEY + NUM_KEYS
FIRST_NOISE = FIRST_VALUE + NUM_VALUES
VOCABULARY = FIRST_NOISE + NUM_NOISE


def draw_rows(rng, rows, length):
    """(tokens [rows, length + 1], depth of each answer's needle in 0..1 [rows, NUM_KEYS])."""
    body = length + 1 - 2 * NUM_KEYS
    row = np.arange(rows)[:, None]
    tokens = rng.integers(FIRST_NOISE, VOCABULARY, (rows, length + 1), np.int32)
    values = rng.integers(0, NUM_VALUES, (rows, NUM_KEYS))
    places = np.argpartition(rng.random((rows, body)), NUM_KEYS)[:, :NUM_KEYS]
    tokens[row, places] = np.arange(NUM_KEYS) * NUM_VALUES + values
    asked = np.argsort(rng.random((rows, NUM_KEYS)))
    tokens[:, body::2], tokens[:, body + 1 :: 2] = (
        FIRST_KEY + asked,
        FIRST_VALUE + values[row, asked],
    )
    return tokens, places[row, asked] / body


def make_batch(tokens):
    """Only the values that follow a key at the end count."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    labels, weights = tokens[:, 1:], np.zeros((rows, length), np.float32)
    weights[:, 1 - 2 * NUM_KEYS :: 2] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return dict(tokens=tokens[:, :-1], labels=labels, weights=weights, positions=positions)


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


def accuracy(model, policy, params, rng, length, num_rows=32):
    """The share of answers that are right, by depth, [NUM_DEPTHS]."""
    execution = ExecutionConfig(remat="none", num_loss_chunks=1)
    decoder = Decoder(model, execution.operations(), policy, execution)

    @jax.jit
    def answers(params, batch):
        x = decoder.embed(params, batch)
        x, _, _ = decoder.run_layers(params, x, decoder.tokens(batch))
        asked = decoder.hidden(params, x[:, 1 - 2 * NUM_KEYS :: 2])
        return jnp.argmax(decoder.unembed(params, asked), -1)

    right, seen = np.zeros(NUM_DEPTHS), np.zeros(NUM_DEPTHS)
    for _ in range(num_rows):
        tokens, depths = draw_rows(rng, 1, length)
        batch = make_batch(tokens)
        is_right = np.asarray(answers(params, batch)) == batch["labels"][:, 1 - 2 * NUM_KEYS :: 2]
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


def train(options, model, policy):
    """The parameters after all stages."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3, b2=0.95))
    params = init_params(parameter_table(model), jax.random.key(0), "float32")
    state, rng, length = optimizer.init(params), np.random.default_rng(0), 0
    while length < options.longest:
        length = min(length * options.factor or options.shortest, options.longest)
        rows = max(options.tokens // length, 1)
        is_first = length == options.shortest
        strategy = Whole() if is_first else FullyPipelined(chunk_tokens=length // 4)
        execution = ExecutionConfig(remat="none", num_loss_chunks=8, strategy=strategy)
        step = make_step(model, execution, policy, optimizer)
        losses, began = [], None
        while not losses or time.perf_counter() - began < options.seconds:
            tokens, _ = draw_rows(rng, rows, length)
            params, state, loss = step(params, state, make_batch(tokens))
            losses.append(float(loss))
            began = began or time.perf_counter()
            if len(losses) > 20 and np.mean(losses[-20:]) < options.enough:
                break
        of_last = f"loss {losses[0]:.3f} at first, {np.mean(losses[-20:]):.3f} at the end"
        print(f"{length:>8,} tokens x {rows}: {len(losses)} steps, {of_last}", flush=True)
    return params


def main():
    """Train from stage to stage, then look at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shortest", type=int, default=512)
    parser.add_argument("--longest", type=int, default=131_072)
    parser.add_argument("--factor", type=int, default=16, help="from stage to stage")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a batch, at least one row")
    parser.add_argument("--seconds", type=float, default=60, help="of a stage at most")
    parser.add_argument("--enough", type=float, default=0.03, help="loss at which a stage ends")
    parser.add_argument("--dim", type=int, default=256)
    options = parser.parse_args()
    heads = dict(num_heads=max(options.dim // 128, 1), num_kv_heads=1, head_dim=128)
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
    print(f"{jax.devices()[0].device_kind}, {options}", flush=True)
    params, rng, found = train(options, model, policy), np.random.default_rng(1), {}
    length = options.shortest
    while length <= options.longest:
        found[length] = accuracy(model, policy, params, rng, length)
        print(
            f"{length:>8,} tokens: {found[length].mean():.3f} of the answers are right", flush=True
        )
        length *= 4
    options.output.mkdir(parents=True, exist_ok=True)
    table = {length: list(row) for length, row in found.items()}
    (options.output / "needle.json").write_text(json.dumps(table))
    draw_picture(found, options.output / "needle.png")


if __name__ == "__main__":
    main()
