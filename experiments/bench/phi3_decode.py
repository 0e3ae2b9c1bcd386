"""Greedy decoding of Phi-3-mini 128K with random weights after a long prompt, ours or a peer's.

Prints milliseconds a token: of a long prompt the time of the prompt is taken off.

python experiments/bench/phi3_decode.py ours --length 128 --bits 4
python experiments/bench/phi3_decode.py huggingface --cache static
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

SHORT = 128
MODELS = Path(__file__).resolve().parents[2] / "tests/convert/fixtures/full_size.json"


def ours(values, prompt, options):
    """A function that decodes so many tokens."""
    import jax

    from jaxscale.convert.families import BY_MODEL_TYPE
    from jaxscale.convert.folder import read_config
    from jaxscale.models.decoder import Decoder
    from jaxscale.models.execution import ExecutionConfig
    from jaxscale.models.parameters import init_params, parameter_table
    from jaxscale.models.quantised import QuantisedConfig, quantised
    from jaxscale.serve.decoding import generate_tokens
    from jaxscale.serve.sampling import SamplingConfig

    model = read_config(BY_MODEL_TYPE["phi3"], values, "config.json", ("lm_head.weight",))
    table = parameter_table(model)
    params = jax.jit(lambda key: init_params(table, key, "bfloat16"))(jax.random.key(0))
    bits = options.bits
    params = quantised(params, table, QuantisedConfig(bits)) if bits else params
    decoder = Decoder(model, execution=ExecutionConfig(remat="none", is_scanned=False))
    greedy = {"sampling": SamplingConfig(temperature=0.0)}
    return lambda num: generate_tokens(decoder, params, [prompt], max_new_tokens=num, **greedy)


def huggingface(values, prompt, options):
    """The same by transformers, which compiles the forward of a static cache."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        config = Phi3Config(**values | {"attn_implementation": "sdpa"})
        model = Phi3ForCausalLM(config).eval()
    tokens = torch.tensor([prompt], device="cuda")
    greedy = {"do_sample": False, "eos_token_id": None, "cache_implementation": options.cache}
    return lambda num: model.generate(tokens, max_new_tokens=num, **greedy).cpu()


def measure(decode, options):
    """(milliseconds a token, seconds of the prompt or None) of the second round.

    A short prompt is read in about the time of one token, and counts as one.
    """
    is_short = options.length <= SHORT
    nums, took = (options.new,) if is_short else (1, options.new + 1), {}
    for _ in range(2):  # the first round compiles
        for num in nums:
            began = time.perf_counter()
            decode(num)
            took[num] = time.perf_counter() - began
    prompt_s = None if is_short else took[1]
    return (took[nums[-1]] - (prompt_s or 0)) / options.new * 1e3, prompt_s


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("who", choices=("ours", "huggingface"))
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--layers", type=int, help="fewer than the model's, to try it")
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--cache", choices=("static", "dynamic"), default="dynamic")
    parser.add_argument("--profile", help="directory for a profile of one more continuation")
    options = parser.parse_args()
    values = json.loads(MODELS.read_text())["Phi-3-mini 128K"]["config"]
    if options.layers:
        values["num_hidden_layers"] = options.layers
    prompt = np.random.default_rng(0).integers(0, values["vocab_size"], options.length).tolist()
    decode = {"ours": ours, "huggingface": huggingface}[options.who](values, prompt, options)
    ms, prompt_s = measure(decode, options)
    figures = {
        "who": options.who,
        "bits": options.bits,
        "cache": options.cache if options.who == "huggingface" else None,
        "length": options.length,
        "ms": round(ms, 4),
        "tokens_per_second": round(1e3 / ms, 2),
        "prompt_s": prompt_s,
    }
    print(json.dumps(figures), flush=True)
    if options.profile:
        import jax

        with jax.profiler.trace(options.profile):
            decode(options.new)


if __name__ == "__main__":
    main()
