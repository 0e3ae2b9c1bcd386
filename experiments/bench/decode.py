"""Greedy decoding on one GPU: jaxscale's `generate_tokens` beside plain JAX (decode_peer.py).

The 1.1B Llama shape, bfloat16, random weights. The peer takes one step per call and issues the
calls without waiting.

python experiments/bench/decode.py  # --tiny tries it on a CPU
"""

import argparse
import functools
import statistics

import jax
from decode_work import END, FULL, TINY, PlainLoop, measure

from jaxscale.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig

BFLOAT16 = Policy(parameters="bfloat16")
IS_SCANNED = {"layers in a loop": True, "layers unrolled": False}


def make_model(shape):
    """The configuration of a shape."""
    layer = LayerConfig(
        AttentionConfig(num_heads=shape.N, num_kv_heads=shape.K, head_dim=shape.H),
        FeedForwardConfig(shape.F),
    )
    return ModelConfig(
        vocab_size=shape.V,
        num_layers=shape.L,
        model_dim=shape.D,
        max_length=4096,
        pattern=(layer,),
    )


def draw_params(model):
    """Random bfloat16 parameters."""
    draw = functools.partial(init_params, parameter_table(model), dtype="bfloat16")
    return jax.jit(draw)(jax.random.key(0))


def make_generate(model, num_new, is_scanned):
    """(params, prompts) -> new tokens, as `decode_work.measure` takes it."""
    execution = ExecutionConfig(is_scanned=is_scanned, remat="none")
    decoder = Decoder(model, execution.operations(), BFLOAT16, execution)
    return functools.partial(
        generate_tokens,
        decoder,
        sampling=SamplingConfig(temperature=0),
        max_new_tokens=num_new,
        eos_id=END,
    )


class Decoding:
    """jaxscale both ways, and the plain loop."""

    def __init__(self, work):
        model = make_model(work.shape)
        self.work, self.plain, self.params = work, PlainLoop(work), draw_params(model)
        self.ways = {
            name: make_generate(model, work.num_new, is_scanned)
            for name, is_scanned in IS_SCANNED.items()
        }

    def round(self):
        """Name -> figures of all in turn, so that a slow moment of the machine meets all alike."""
        found = {"plain JAX, unrolled": self.plain.measure()}
        for name, generate in self.ways.items():
            found[name] = measure(generate, self.params, self.work)
        return found


def main():
    """The first round compiles and is not counted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small shape, for a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    work = TINY if options.tiny else FULL
    decoding = Decoding(work)
    rounds = [decoding.round() for _ in range(1 + options.rounds)][1:]
    print(f"{jax.devices()[0].device_kind}, medians of {options.rounds} rounds\n")
    batch = f"{work.num_prompts} prompts of {work.long_prompt}, {work.num_new} new"
    print(f"| what | batch 1, tokens/s | {batch}: requests/s |\n|---|---|---|")
    for name in rounds[0]:
        cells = [name]
        for figure in ("tokens_per_second", "requests_per_second"):
            found = [each[name][figure] for each in rounds if figure in each[name]]
            cells.append(f"{statistics.median(found):.2f}" if found else "-")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
