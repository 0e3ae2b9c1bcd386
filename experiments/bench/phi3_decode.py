"""Greedy decoding of Phi-3-mini 128K with random weights after a long prompt, ours or a peer's.

Prints milliseconds a token, of the difference of two continuations' lengths.

python experiments/bench/phi3_decode.py ours --bits 4
python experiments/bench/phi3_decode.py huggingface
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

MODELS = Path(__file__).resolve().parents[2] / "tests/convert/fixtures/full_size.json"


def ours(values, prompt, bits):
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
    params = quantised(params, table, QuantisedConfig(bits)) if bits else params
    decoder = Decoder(model, execution=ExecutionConfig(remat="none", is_scanned=False))
    greedy = {"sampling": SamplingConfig(temperature=0.0)}
    return lambda num: generate_tokens(decoder, params, [prompt], max_new_tokens=num, **greedy)


def huggingface(values, prompt, bits):
    """The same by transformers, with a static cache."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**values | {"attn_implementation": "sdpa"})
    model = Phi3ForCausalLM(config).to("cuda", torch.bfloat16).eval()
    tokens = torch.tensor([prompt], device="cuda")
    greedy = {"do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    return lambda num: model.generate(tokens, max_new_tokens=num, **greedy).cpu()


def main(who, values, length, bits):
    """Decodes 1 and 129 tokens, twice, of which the first time compiles."""
    prompt = np.random.default_rng(0).integers(0, values["vocab_size"], length).tolist()
    decode = {"ours": ours, "huggingface": huggingface}[who](values, prompt, bits)
    seconds = []
    for num in (1, 129, 1, 129):
        began = time.perf_counter()
        decode(num)
        seconds.append(time.perf_counter() - began)
    print(who, bits, length, round((seconds[3] - seconds[2]) / 128 * 1000, 3), "ms a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("ours", "huggingface"))
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--bits", type=int, choices=(4, 8))
    given = parser.parse_args()
    released = json.loads(MODELS.read_text())["Phi-3-mini 128K"]["config"]
    main(given.who, released, given.length, given.bits)
