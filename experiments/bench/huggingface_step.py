"""The peer of train_step.py: Hugging Face Llama, Mixtral or Phi-3-mini, torch.compile, fused AdamW.

Prints one JSON line.

python experiments/bench/huggingface_step.py llama --precision autocast

"masters" is autocast's alternative: weights and gradients in bfloat16, AdamW on float32 copies of
the weights. With it Mixtral keeps its grouped matmul, which transformers leaves for a loop over
experts where autocast makes types differ.
"""

import argparse
import json
import time

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

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
# Without the 4K model's window of 2,047, for which "sdpa" takes a slower kernel with a mask.
PHI3 = LLAMA | dict(
    hidden_size=3072,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    sliding_window=None,
)
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA),
    "mixtral": (MixtralConfig, MixtralForCausalLM, MIXTRAL),
    "phi3": (Phi3Config, Phi3ForCausalLM, PHI3),
}
WARMUP_STEPS = 5


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--precision", choices=("autocast", "bf16", "masters"), default="autocast")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=WARMUP_STEPS)
    help_of_layers = "compiles one layer for all, and the loss, instead of the whole model"
    parser.add_argument("--by_layer", action="store_true", help=help_of_layers)
    return parser.parse_args()


class Trainer:
    """A model on the GPU with its compiled step, on one batch of random tokens."""

    def __init__(self, options):
        config_class, model_class, shape = MODELS[options.model]
        self.is_autocast = options.precision == "autocast"
        torch.set_default_dtype(torch.float32 if self.is_autocast else torch.bfloat16)
        with torch.device("cuda"):
            model = model_class(config_class(**shape))
            size = (options.rows, options.length)
            self.tokens = torch.randint(0, shape["vocab_size"], size)
        self.weights = list(model.parameters())
        self.masters = None
        if options.precision == "masters":
            self.masters = [w.detach().float().requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters or self.weights, lr=1e-4, fused=True)
        self.compiled = model if options.by_layer else torch.compile(model)
        if options.by_layer:
            for layer in model.model.layers:
                layer.compile()
            model.loss_function = torch.compile(model.loss_function)

    def step(self):
        """Forward, backward, clipping and update; returns the loss on the device."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.is_autocast):
            loss = self.compiled(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        if self.masters:
            for master, weight in zip(self.masters, self.weights):
                master.grad, weight.grad = weight.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return loss


def main():
    """Warm up, time, and print the figures."""
    options = parse_arguments()
    trainer = Trainer(options)
    for _ in range(options.warmup):
        trainer.step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(options.steps):
        loss = trainer.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / options.steps
    figures = {
        "by_layer": options.by_layer,
        "peer": f"huggingface {options.model} {options.precision}",
        "ms": seconds * 1e3,
        "tokens_per_second": options.rows * options.length / seconds,
        "loss": loss.item(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
