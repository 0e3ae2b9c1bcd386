"""The peer of phi3_decode.py at its fastest: Hugging Face's model, a token one CUDA graph.

The cache is static, so that no token copies it, and nothing waits for the host. Without the mask of
slots that are not written yet torch may take FlashAttention, which divides the keys among blocks;
so the cache is full, and its last slots count as read. Positions are rotated without LongRoPE,
whose choice of factors waits for the device. Prints a JSON line for each.

python experiments/bench/phi3_decode_graph.py  # --layers 2 --length 1024 tries it on a CPU
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import Phi3Config, Phi3ForCausalLM, StaticCache
from transformers.models.phi3 import modeling_phi3

MODELS = Path(__file__).resolve().parents[2] / "tests/convert/fixtures/full_size.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP = 3


def make_model(num_layers):
    """Phi-3-mini 128K with random weights in bfloat16."""
    values = json.loads(MODELS.read_text())["Phi-3-mini 128K"]["config"]
    values |= {"sliding_window": None, "attn_implementation": "sdpa"}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    values.pop("rope_scaling")
    values["num_hidden_layers"] = num_layers or values["num_hidden_layers"]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        return Phi3ForCausalLM(Phi3Config(**values)).eval()


def filled(config, length, capacity):
    """A static cache with random keys and values of `length` tokens."""
    cache = StaticCache(config=config, max_cache_len=capacity)
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        noise = torch.randn((1, heads, length, width), device=DEVICE)
        cache.update(noise, noise, layer)
    return cache


def make_step(model, cache, length, capacity, is_masked):
    """A function that decodes one more token, greedily; all that it changes is on the device."""
    token = torch.zeros((1, 1), dtype=torch.long, device=DEVICE)
    place = torch.full((1, 1), length, dtype=torch.long, device=DEVICE)
    slots = torch.arange(capacity, device=DEVICE)

    def mask(**_):
        return (slots <= place)[None, None] if is_masked else None

    def step():
        logits = model(input_ids=token, position_ids=place, past_key_values=cache).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        place.add_(1)

    modeling_phi3.create_causal_mask = mask
    return step


def graph_of(step):
    """Its replay; without a GPU the step itself."""
    if DEVICE == "cpu":
        return step
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step, new):
    """Of a token."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else torch.cpu.synchronize
    step()
    wait()
    began = time.perf_counter()
    for _ in range(new):
        step()
    wait()
    return (time.perf_counter() - began) / new * 1e3


@torch.no_grad()
def main():
    """Prints two lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--layers", type=int, help="fewer than the model's, to try it")
    options = parser.parse_args()
    model = make_model(options.layers)
    length, capacity = options.length, options.length + options.new + WARMUP + 2
    cache = filled(model.config, length, capacity)
    for is_masked in (False, True):
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        step = make_step(model, cache, length, capacity, is_masked)
        ms = milliseconds(graph_of(step), options.new)
        figures = {
            "who": "huggingface, a graph",
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
            "layers": model.config.num_hidden_layers,
            "is_masked": is_masked,
            "length": length,
            "ms": round(ms, 4),
            "tokens_per_second": round(1e3 / ms, 2),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
