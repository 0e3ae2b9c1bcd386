"""The MFU above which no step can be, by length, and what was measured: a picture.

A step that is nothing but attention at the kernel's rate and the model's matmuls, once; and one
whose backward makes the layers again, and attention or not. The rates are an H200's, measured by
experiments/bench/long_step.py, whose lines are the measured points.

python experiments/long_mfu.py experiments/results/2026-11-29_h200_fpdt.jsonl OUT.png
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from jaxscale.models.config.model import training_flops_per_token
from jaxscale.models.parameters import count_parameters
from jaxscale.run.run import load_run

PEAK = 989e12  # FLOP/s of bfloat16
FORWARD, BOTH, MATMUL = 712e12, 576e12, 780e12  # FLOP/s: attention, with its backward; a matmul
TWICE = "chunks, attention twice"
PLACES = (("whole", 0), ("chunks", 0), ("chunks", 1), (TWICE, 0), (TWICE, 1))
RECOMPUTED = {"nothing made again": (0, 0), "layers made again": (1, 0), "attention too": (1, 1)}


def cap(run, length, layers_again, attention_again):
    """The MFU of a step that loses no time."""
    config = run.model.layers[0].attention
    _, active = count_parameters(run.table())
    num_layers = len(run.model.layers)
    one_forward = 2.0 * length**2 * config.num_heads * config.head_dim * num_layers
    attention_s = 3.5 * one_forward / BOTH + attention_again * one_forward / FORWARD
    least = attention_s + (6 + 2 * layers_again) * active * length / MATMUL
    return training_flops_per_token(run.model, active, length) * length / least / PEAK


def main(measured, output):
    """One panel a shape."""
    points = [json.loads(line) for line in Path(measured).read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, gridspec_kw={"top": 0.7})
    lengths = [2**n for n in range(15, 23)]
    for axis, shape in zip(axes, ("8b", "1b")):
        run = load_run([f"experiments/configs/papers/fpdt_{shape}.gin"], [])
        for name, again in RECOMPUTED.items():
            axis.plot(lengths, [cap(run, length, *again) for length in lengths], label=name)
        for (strategy, is_full), style in zip(PLACES, "so*+x"):
            own = [p for p in points if (p["shape"], p["strategy"]) == (shape, strategy)]
            own = [p for p in own if (p["layers"] == len(run.model.layers)) == is_full]
            label = f"{strategy}, measured on {'all' if is_full else 'fewer'} layers"
            axis.plot([p["tokens"] for p in own], [p["mfu"] for p in own], f"k{style}", label=label)
        axis.set_xscale("log", base=2)
        axis.set(title=f"{shape}, caps of all layers", xlabel="tokens")
    axes[0].set_ylabel("MFU")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, fontsize=8, loc="upper center")
    figure.savefig(output, bbox_inches="tight", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
