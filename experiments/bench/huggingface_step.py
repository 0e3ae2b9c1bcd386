"""The peer of train_step.py: Hugging Face Llama or Mixtral, torch.compile, fused AdamW, on the same shapes; one JSON line.

    python experiments/bench/huggingface_step.py llama --precision autocast
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

LLAMA = dict(
    vocab_size=32064, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8,
    intermediate_size=8192, max_position_embeddings=4096, use_cache=False,
)  # fmt: skip
MIXTRAL = LLAMA | dict(
    num_hidden_layers=12, num_key_value_heads=4, intermediate_size=3200, num_local_experts=16, num_experts_per_tok=2
)


def make_model(name, dtype):
    """The model on the GPU, attention by torch's scaled_dot_product_attention."""
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        if name == "llama":
            return LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="sdpa"))
        return MixtralForCausalLM(
            MixtralConfig(**MIXTRAL, attn_implementation="sdpa", experts_implementation="grouped_mm")
        )


def main(name, precision, rows, length, num_steps):
    """Compiles, warms up for five steps, times `num_steps` steps."""
    torch.backends.cuda.matmul.allow_tf32 = True
    model = make_model(name, torch.float32 if precision == "autocast" else torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)
    tokens = torch.randint(0, LLAMA["vocab_size"], (rows, length), device="cuda")
    times = []
    for _ in range(num_steps + 5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = sorted(times[5:])[num_steps // 2]
    print(json.dumps({
        "peer": f"huggingface {name} {precision}", "ms": round(seconds * 1e3, 1), "loss": loss.item(),
        "tokens_per_second": round(rows * length / seconds), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("llama", "mixtral"))
    parser.add_argument("--precision", choices=("autocast", "bf16"), default="autocast")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    main(options.model, options.precision, options.rows, options.length, options.steps)
