"""Greedy decoding of Phi-3-mini 128K with random weights behind a filled cache, ours or a peer's.

The cache begins with random keys and values of `length` tokens, so that no prompt need be read.
Prints milliseconds a token.

python experiments/bench/phi3_decode.py ours --length 128 --new 256 --bits 4
python experiments/bench/phi3_decode.py huggingface --cache static
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "tests/convert/fixtures/full_size.json"
ROUNDS = 2  # of which the first compiles


def ours(values, options, bits):
    """(what fills the caches, a function of them that decodes all tokens)."""
    import jax
    import jax.numpy as jnp

    from jaxscale.convert.families import BY_MODEL_TYPE
    from jaxscale.convert.folder import read_config
    from jaxscale.models.decoder import Decoder
    from jaxscale.models.execution import ExecutionConfig
    from jaxscale.models.parameters import init_params, parameter_table
    from jaxscale.models.quantised import QuantisedConfig, quantised
    from jaxscale.ops.attention.cache import KVCache
    from jaxscale.serve.caches import empty_caches
    from jaxscale.serve.decoding import Loop
    from jaxscale.serve.sampling import SamplingConfig

    length, new = options.length, options.new
    model = read_config(BY_MODEL_TYPE["phi3"], values, "config.json", ("lm_head.weight",))
    table = parameter_table(model)
    params = jax.jit(lambda key: init_params(table, key, "bfloat16"))(jax.random.key(0))
    if bits < 16:
        params = quantised(params, table, QuantisedConfig(bits, options.embedding_bits))
    decoder = Decoder(model, execution=ExecutionConfig(remat="none", is_scanned=False))
    params = jax.jit(decoder.prepared)(params)

    def fill_one(cache):
        noise = jax.random.normal(jax.random.key(1), cache.k.shape, cache.k.dtype)
        return dataclasses.replace(cache, k=noise, v=noise)

    def with_slots(cache):  # of all layers the same, as they are where a prompt was read
        slots = jnp.arange(cache.k.shape[2])
        is_used = slots[None] < length
        places = jnp.where(is_used, slots, -1)
        return dataclasses.replace(
            cache, positions=places, segments=is_used.astype(jnp.int32), length=jnp.int32(length)
        )

    def each_layer(f, caches):
        return jax.tree.map(f, caches, is_leaf=lambda leaf: isinstance(leaf, KVCache))

    @jax.jit
    def fill():
        return each_layer(fill_one, empty_caches(decoder, 1, length + new))

    loop = Loop(decoder, SamplingConfig(temperature=0.0), new, None, None)
    first, lengths = jnp.zeros((1,), jnp.int32), jnp.full((1,), length)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, caches):
        caches = each_layer(with_slots, caches)
        return loop.onwards(params, caches, lengths, first, lambda logits, _: jnp.argmax(logits, 1))

    return fill, lambda caches: decode(params, caches)[0].block_until_ready()


def huggingface(values, options, bits):
    """The same by transformers, which compiles the forward of a static cache."""
    import torch
    from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM, StaticCache

    torch.set_default_dtype(torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        config = Phi3Config(**values | {"attn_implementation": "sdpa"})
        model = Phi3ForCausalLM(config).eval()
    length, new = options.length, options.new
    # One token more than is in the cache, which is the one to be read.
    tokens = torch.zeros((1, length + 1), dtype=torch.long, device=device)
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads

    def fill():
        if options.cache == "static":
            cache = StaticCache(config=config, max_cache_len=length + new + 1)
        else:
            cache = DynamicCache(config=config)
        places = {"cache_position": torch.arange(length, device=device)}
        for layer in range(config.num_hidden_layers):
            noise = torch.randn((1, heads, length, width), device=device)
            cache.update(noise, noise, layer, places)
        return cache

    def decode(cache):
        settings = {"do_sample": False, "eos_token_id": None, "past_key_values": cache}
        found = model.generate(tokens, max_new_tokens=new, **settings).cpu()
        assert found.shape[1] == length + 1 + new

    return fill, decode


def device_of(who):
    """The card's name."""
    if who == "huggingface":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import jax

    return jax.devices()[0].device_kind


def measure(fill, decode, options):
    """Milliseconds a token of the last round."""
    for _ in range(ROUNDS):
        caches = fill()
        began = time.perf_counter()
        decode(caches)
        took = time.perf_counter() - began
        del caches
    return took / options.new * 1e3


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("who", choices=("ours", "huggingface"))
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--layers", type=int, help="fewer than the model's, to try it")
    help_of_bits = "of ours, one after the other in one process; 16 is bfloat16"
    parser.add_argument("--bits", type=int, nargs="+", default=[16], help=help_of_bits)
    parser.add_argument("--embedding_bits", type=int, choices=(4, 8))
    parser.add_argument("--cache", choices=("static", "dynamic"), default="dynamic")
    parser.add_argument("--profile", help="directory for a profile of one more continuation")
    options = parser.parse_args()
    values = json.loads(MODELS.read_text())["Phi-3-mini 128K"]["config"]
    if options.layers:
        values["num_hidden_layers"] = options.layers
    for bits in options.bits:
        fill, decode = {"ours": ours, "huggingface": huggingface}[options.who](
            values, options, bits
        )
        ms = measure(fill, decode, options)
        figures = {
            "who": options.who,
            "device": device_of(options.who),
            "layers": values["num_hidden_layers"],
            "bits": bits,
            "embedding_bits": options.embedding_bits if bits < 16 else None,
            "cache": options.cache if options.who == "huggingface" else None,
            "length": options.length,
            "ms": round(ms, 4),
            "tokens_per_second": round(1e3 / ms, 2),
        }
        print(json.dumps(figures), flush=True)
    if options.profile:
        import jax

        caches = fill()
        with jax.profiler.trace(options.profile):
            decode(caches)


if __name__ == "__main__":
    main()
