"""The peer of train_step.py: Hugging Face Llama or Mixtral with torch.compile and fused AdamW; prints one JSON line.

python experiments/bench/huggingface_step.py llama --precision autocast

"masters" is autocast's alternative: weights and gradients in bfloat16, AdamW on float32 copies of
the weights. With it Mixtral keeps its grouped matmul, which transformers leaves for a loop over
experts where autocast makes types differ.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

LLAMA = dict(
    vocab_size=32064,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=8,
    intermediate_size=8192,
    max_position_embeddings=4096,
    use_cache=False,
    attn_implementation="sdpa",
)
MIXTRAL = LLAMA | dict(
    num_hidden_layers=12,
    num_key_value_heads=4,
    intermediate_size=3200,
    num_local_experts=16,
    num_experts_per_tok=2,
    experts_implementation="grouped_mm",
)
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA),
    "mixtral": (MixtralConfig, MixtralForCausalLM, MIXTRAL),
}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("model", choices=MODELS)
parser.add_argument("--precision", choices=("autocast", "bf16", "masters"), default="autocast")
for name, default in (("--rows", 4), ("--length", 4096), ("--steps", 20)):
    parser.add_argument(name, type=int, default=default)
options = parser.parse_args()

config_class, model_class, shape = MODELS[options.model]
torch.set_default_dtype(torch.float32 if options.precision == "autocast" else torch.bfloat16)
with torch.device("cuda"):
    model = model_class(config_class(**shape))
    tokens = torch.randint(0, shape["vocab_size"], (options.rows, options.length))
weights = list(model.parameters())
updated = (
    [w.detach().float().requires_grad_() for w in weights]
    if options.precision == "masters"
    else weights
)
optimizer = torch.optim.AdamW(updated, lr=1e-4, fused=True)
compiled = torch.compile(model)


def step():
    """Forward, backward, clipping and update; returns the loss on the device."""
    with torch.autocast("cuda", torch.bfloat16, enabled=options.precision == "autocast"):
        loss = compiled(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    if updated is not weights:
        for master, weight in zip(updated, weights):
            master.grad, weight.grad = weight.grad.float(), None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if updated is not weights:
        with torch.no_grad():
            torch._foreach_copy_(weights, updated)
    return loss


for _ in range(5):
    step()
torch.cuda.synchronize()
began = time.perf_counter()
for _ in range(options.steps):
    last = step()
torch.cuda.synchronize()
seconds = (time.perf_counter() - began) / options.steps
figures = {
    "ms": seconds * 1e3,
    "tokens_per_second": options.rows * options.length / seconds,
    "loss": last.item(),
}
figures |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
print(json.dumps({"peer": f"huggingface {options.model} {options.precision}"} | figures))
