"""LongRoPE's search: factors on rotary frequencies that extend a small model's context 8 times.

A model trained on rows of 32 bytes reads rows of 256. Candidates mutate and cross; the fittest
have the lowest loss on rows for the search, and the result is measured on others. Nothing is
trained after the first training. Writes a JSON file, of which draw.py makes a picture.

Source: Ding et al. 2024, LongRoPE (arXiv 2402.13753), section 3.2, without its start tokens.

python experiments/phi3/longrope.py experiments/results/2026-11-29_longrope.json
python experiments/phi3/longrope.py /tmp/longrope.json --steps 20 --generations 2 --population 4
"""

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small import draw_rows, losses, make_model, read_text, train

from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.rotary import LinearScaling, LongRopeScaling, RotaryConfig, YarnScaling

DIM, HEAD_DIM, SHORT, STRETCH, BATCH = 64, 32, 32, 8, 32
PAIRS, LONG, BIN = HEAD_DIM // 2, SHORT * STRETCH, 16
MAGNITUDE = math.sqrt(1 + math.log(STRETCH) / math.log(SHORT))


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate(LongRopeScaling):
    """Factors and magnitude that are values of a compiled program, one for all candidates."""

    __hash__, __eq__ = object.__hash__, object.__eq__

    def __post_init__(self):
        pass

    def frequencies(self, plain, theta):
        """As `LongRopeScaling`."""
        return plain / self.factors


def model_with(scaling):
    """The model with a scaling of its rotary positions."""
    return make_model(DIM, head_dim=HEAD_DIM, rotary=RotaryConfig(scaling=scaling), init_std=0.09)


def by_position(scaling, params, rows):
    """Nats at each position, the mean over rows, a few rows at a time."""
    one = jax.jit(functools.partial(losses, model_with(scaling)))
    return np.mean([one(params, part).mean(0) for part in np.array_split(rows, 8)], 0)


@jax.jit
def fitness(genes, params, rows):
    """Nats of rows for candidates [population, PAIRS + 1], whose last gene is the magnitude."""

    def one(gene):
        scaling = Candidate(gene[:PAIRS], gene[PAIRS])
        return losses(model_with(scaling), params, rows).mean()

    return jax.lax.map(one, genes)


def start(population, rng):
    """Candidates around no scaling, one factor for all, and YaRN's factors."""
    plain = RotaryConfig().frequencies(HEAD_DIM)
    yarn = plain / YarnScaling(STRETCH, SHORT).frequencies(plain, 10000.0)
    ntk = STRETCH ** (np.arange(PAIRS) / (PAIRS - 1))
    seeds = [np.ones(PAIRS), np.full(PAIRS, float(STRETCH)), yarn, ntk]
    genes = np.stack([np.append(seeds[i % 4], MAGNITUDE) for i in range(population)])
    genes[:4, PAIRS] = 1.0
    return np.concatenate([genes[:4], mutated(genes[4:], rng)])


def mutated(genes, rng):
    """Some genes changed; factors rise from pair to pair, from 1 up to a little above STRETCH."""
    changes = np.exp(rng.normal(0, 0.15, genes.shape)) ** (rng.random(genes.shape) < 0.3)
    new = genes * changes
    new[:, :PAIRS] = np.maximum.accumulate(np.clip(new[:, :PAIRS], 1, 1.25 * STRETCH), 1)
    new[:, PAIRS] = np.clip(new[:, PAIRS], 1, 1.3)
    return new


def search(params, rows, population, generations, rng):
    """(the fittest genes, the best loss of each generation)."""
    genes, best = start(population, rng), []
    for _ in range(generations):
        found = np.asarray(fitness(jnp.asarray(genes, jnp.float32), params, rows))
        parents = genes[np.argsort(found)[: max(population // 4, 1)]]
        best.append(float(found.min()))
        print(f"generation {len(best)}: {best[-1]:.4f}", flush=True)
        pairs = parents[rng.integers(0, len(parents), (2, population - len(parents)))]
        crossed = np.where(rng.random(pairs[0].shape) < 0.5, *pairs)
        genes = np.concatenate([parents, mutated(crossed, rng)])
    return parents[0], best


def main():
    """Trains, searches, writes the record, prints the losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--generations", type=int, default=8)
    options = parser.parse_args()
    (text, held_out), plain = read_text(), model_with(None)
    half = len(held_out) // 2
    rows = draw_rows(text, options.steps * BATCH, SHORT, 0).reshape(options.steps, BATCH, -1)
    params = init_params(parameter_table(plain), jax.random.key(0), "float32")
    params, history = train(plain, params, jnp.asarray(rows), 4e-3)
    print(f"trained to {history[-50:].mean():.4f} nats a byte", flush=True)
    searched_on = jnp.asarray(draw_rows(held_out[:half], 4, LONG, 1))
    rng = np.random.default_rng(2)
    genes, best = search(params, searched_on, options.population, options.generations, rng)
    factors = tuple(float(each) for each in genes[:PAIRS])
    ways = {
        "before: no scaling": None,
        "one factor for all": LinearScaling(float(STRETCH)),
        "YaRN": YarnScaling(float(STRETCH), SHORT),
        "after: searched factors": LongRopeScaling(factors, float(genes[PAIRS])),
    }
    test = draw_rows(held_out[half:], 32, LONG, 3)
    record = {
        "short": SHORT,
        "bin": BIN,
        "factors": factors,
        "magnitude": float(genes[PAIRS]),
        "best_by_generation": best,
    }
    for name, scaling in ways.items():
        curve = by_position(scaling, params, test).reshape(-1, BIN).mean(1)
        within, beyond = curve[: SHORT // BIN].mean(), curve[SHORT // BIN :].mean()
        record[name] = {"within": float(within), "beyond": float(beyond), "curve": curve.tolist()}
        print(f"{name}: {within:.4f} nats a byte up to {SHORT}, {beyond:.4f} beyond", flush=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
