"""muP's width transfer: the best learning rate at three widths, with muP and without.

All learning rates of a width train at once. Writes a JSON file, of which draw.py makes a picture.

python experiments/phi3/mup.py experiments/results/2026-11-29_mup.json
python experiments/phi3/mup.py /tmp/mup.json --widths 32 64 --steps 10 --rates 3
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small import draw_rows, losses, make_model, read_text, train

from jaxscale.models.parameters import init_params, parameter_table

HEAD_DIM, LENGTH, BATCH = 16, 64, 16


def of_width(dim, base, is_mup):
    """The model of a width; both ways give the same at the base."""
    m = dim / base
    if is_mup:
        more = dict(init_std=base**-0.5, width_multiplier=m, unembedding_scale=1 / m)
    else:
        more = dict(init_std=dim**-0.5)
    return make_model(dim, head_dim=HEAD_DIM, **more)


def held_out_losses(model, rates, steps, texts):
    """[rates] nats of held-out text."""
    training, held_out = texts
    test = draw_rows(held_out, 128, LENGTH, seed=99)
    rows = jnp.asarray(draw_rows(training, steps * BATCH, LENGTH, 0).reshape(steps, BATCH, -1))
    params = init_params(parameter_table(model), jax.random.key(0), "float32")

    def one(rate):
        return losses(model, train(model, params, rows, rate)[0], test).mean()

    return np.asarray(jax.jit(jax.vmap(one))(rates))


def best_rate(rates, found):
    """The minimum of a parabola through the lowest three, in the rate's logarithm."""
    found = np.where(np.isfinite(found), found, np.nanmax(found[np.isfinite(found)]))
    place = int(np.clip(np.argmin(found), 1, len(rates) - 2))
    near = slice(place - 1, place + 2)
    a, b, _ = np.polyfit(np.log2(rates[near]), found[near], 2)
    return float(2 ** (-b / (2 * a))) if a > 0 else float(rates[np.argmin(found)])


def main():
    """Trains all, writes the record, prints the best rates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=(16, 32, 64))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rates", type=int, default=5)
    options = parser.parse_args()
    rates = 2.0 ** (-4.0 - np.arange(options.rates)[::-1])
    texts, record = read_text(), {"rates": rates.tolist(), "steps": options.steps}
    for name in ("muP", "standard"):
        record[name] = {}
        for dim in options.widths:
            model = of_width(dim, options.widths[0], name == "muP")
            found = held_out_losses(model, jnp.asarray(rates), options.steps, texts)
            best = best_rate(rates, found)
            record[name][dim] = {"losses": found.tolist(), "best_rate": best}
            options.output.write_text(json.dumps(record, indent=1) + "\n")
            print(name, dim, f"best {best:.5f}", found.round(4).tolist(), flush=True)
        bests = [each["best_rate"] for each in record[name].values()]
        factor = max(bests) / min(bests)
        print(f"{name}: largest over smallest best rate {factor:.3f}", flush=True)


if __name__ == "__main__":
    main()
