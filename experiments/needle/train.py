"""Train a small model in chunks to find needles in long noise; a heat map of what it finds.

A row is noise, among which lies for every key, at a random depth, a needle: a token that stands for
the key and a random value. At the row's end each key is asked for, and the token after it must be
its value. Only those tokens count. The first stage takes short rows in whole layers, the others
longer and fewer ones in chunks; a stage ends when it finds nearly all, or its time is up.

A row asks for 16 values only, and the gradient of so few is mostly noise. At the learning rate at
which the first stage learns to look, such noise makes needles unfindable one by one, and attention
that is sure of another place gives them no gradient to come back. So the later stages take a
quarter of that rate, and in every stage it falls to zero with the stage's time.

python experiments/needle/train.py --output runs/needle
python experiments/needle/train.py --output runs/needle --longest 1024 --tokens 2048 --dim 128
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
FIRST_RATE, LATER_RATE = 2e-3, 5e-4
NUM_LAST = 50  # steps whose mean loss says whether a stage has found enough


def draw_rows(rng, rows, length):
    """(tokens [rows, length + 1], depth of each answer's needle in 0..1 [rows, NUM_KEYS])."""
    body = length + 1 - 2 * NUM_KEYS
    row = np.arange(rows)[:, None]
    tokens = rng.integers(FIRST_NOISE, VOCABULARY, (rows, length + 1), np.int32)
    values = rng.integers(0, NUM_VALUES, (rows, NUM_KEYS))
    places = np.argpartition(rng.random((rows, body)), NUM_KEYS)[:, :NUM_KEYS]
    tokens[row, places] = np.arange(NUM_KEYS) * NUM_VALUES + values
    asked = np.argsort(rng.random((rows, NUM_KEYS)))
    tokens[:, body::2] = FIRST_KEY + asked
    tokens[:, body + 1 :: 2] = FIRST_VALUE + values[row, asked]
    return tokens, places[row, asked] / body


def make_batch(tokens):
    """Only the values that follow a key at the end count."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    labels, weights = tokens[:, 1:], np.zeros((rows, length), np.float32)
    weights[:, 1 - 2 * NUM_KEYS :: 2] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return dict(tokens=tokens[:, :-1], labels=labels, weights=weights, positions=positions)


def make_step(model, execution, policy, optimizer):
    """(params, state, batch, learning rate) -> (params, state, mean loss), compiled."""
    loss_fn = NextTokenLoss(model, policy, execution)

    def mean(params, batch):
        total, weight, _ = loss_fn(params, batch, None)
        return total / weight

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, rate):
        loss, gradient = jax.value_and_grad(mean)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, optax.tree.scale(-rate, updates)), state, loss

    return step


def make_answer(model, policy):
    """(params, batch) -> the token that is most likely after each key that is asked for."""
    execution = ExecutionConfig(remat="none", num_loss_chunks=1)
    decoder = Decoder(model, execution.operations(), policy, execution)

    @jax.jit
    def answer(params, batch):
        x, _, _ = decoder.run_layers(params, decoder.embed(params, batch), decoder.tokens(batch))
        asked = decoder.hidden(params, x[:, 1 - 2 * NUM_KEYS :: 2])
        return jnp.argmax(decoder.unembed(params, asked), -1)

    return answer


def accuracy(answer, params, length, num_rows=64):
    """The share of answers that are right, by depth, [NUM_DEPTHS]; rows that no stage has seen."""
    rng, right, seen = np.random.default_rng(1), np.zeros(NUM_DEPTHS), np.zeros(NUM_DEPTHS)
    for _ in range(num_rows):
        tokens, depths = draw_rows(rng, 1, length)
        batch = make_batch(tokens)
        is_right = np.asarray(answer(params, batch)) == batch["labels"][:, 1 - 2 * NUM_KEYS :: 2]
        number = (depths * NUM_DEPTHS).astype(int)
        np.add.at(right, number, is_right)
        np.add.at(seen, number, 1)
    return right / np.maximum(seen, 1)


def lengths_until(longest, shortest, factor):
    """From the shortest by the factor, and the longest."""
    while shortest < longest:
        yield shortest
        shortest *= factor
    yield longest


def draw_picture(found, path):
    """Depth upwards, length to the right."""
    figure, axis = plt.subplots(figsize=(6, 4))
    table = np.array(list(found.values())).T
    image = axis.imshow(table, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
    for (row, column), share in np.ndenumerate(table):
        color = "black" if share > 0.6 else "white"
        axis.text(column, row, f"{share:.2f}", ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(found)), [f"{length:,}" for length in found], fontsize=8)
    axis.set_yticks(range(NUM_DEPTHS), [f"{i / NUM_DEPTHS:.0%}" for i in range(NUM_DEPTHS)])
    axis.set_xlabel("tokens")
    axis.set_ylabel("depth of the needle")
    figure.colorbar(image, label="answers that are right")
    figure.savefig(path, bbox_inches="tight", dpi=120)


def train(options, model, policy, answer):
    """The parameters after all stages."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95))
    params = init_params(parameter_table(model), jax.random.key(0), "float32")
    state, rng = optimizer.init(params), np.random.default_rng(0)
    for length in lengths_until(options.longest, options.shortest, options.factor):
        rows = max(options.tokens // length, 1)
        is_first = length == options.shortest
        strategy = Whole() if is_first else FullyPipelined(chunk_tokens=length // 4)
        execution = ExecutionConfig(remat="none", num_loss_chunks=8, strategy=strategy)
        step = make_step(model, execution, policy, optimizer)
        losses, began, left = [], None, 1.0
        while left > 0:
            batch = make_batch(draw_rows(rng, rows, length)[0])
            rate = left * (FIRST_RATE if is_first else LATER_RATE)
            params, state, loss = step(params, state, batch, rate)
            losses.append(float(loss))
            if len(losses) >= NUM_LAST and np.mean(losses[-NUM_LAST:]) < options.enough:
                break
            began = began or time.perf_counter()  # once the first step has been compiled
            left = 1 - (time.perf_counter() - began) / options.seconds
        of_loss = f"loss {losses[0]:.3f} at first, {np.mean(losses[-NUM_LAST:]):.3f} at the end"
        right = f"right {accuracy(answer, params, length).mean():.3f}"
        print(f"{length:>8,} tokens x {rows}: {len(losses)} steps, {of_loss}, {right}", flush=True)
    return params


def main():
    """Train from stage to stage, then look at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=131_072)
    parser.add_argument("--factor", type=int, default=8, help="from stage to stage")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a batch, at least one row")
    parser.add_argument("--seconds", type=float, default=30, help="of a stage at most")
    parser.add_argument("--enough", type=float, default=0.01, help="loss at which a stage ends")
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
    policy = Policy(compute="bfloat16" if jax.default_backend() == "gpu" else "float32")
    print(f"{jax.devices()[0].device_kind}, {options}", flush=True)
    answer, found = make_answer(model, policy), {}
    params = train(options, model, policy, answer)
    for length in lengths_until(options.longest, options.shortest, 4):
        found[length] = accuracy(answer, params, length)
        share = f"{found[length].mean():.3f} of the answers are right"
        print(f"{length:>8,} tokens: {share}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "needle.json").write_text(json.dumps({n: list(found[n]) for n in found}))
    draw_picture(found, options.output / "needle.png")


if __name__ == "__main__":
    main()
