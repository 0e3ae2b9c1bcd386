"""The peer of train_step.py on several GPUs: Hugging Face Llama under FSDP2 or tensor parallelism.

Prints one JSON line.

torchrun --standalone --nproc-per-node 2 \\
    experiments/bench/torch_parallel_step.py fsdp --model 1b --rows 8
"""

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, parallel
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA = dict(
    vocab_size=32064,
    intermediate_size=8192,
    num_key_value_heads=8,
    attn_implementation="sdpa",
)
MODELS = {
    "1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16),
    "3b": dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
    "8b": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "tiny": dict(hidden_size=512, num_hidden_layers=2, num_attention_heads=8),
}
WARMUP_STEPS = 5


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("fsdp", "tensor"))
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--zero",
        type=int,
        choices=(2, 3),
        default=3,
        help="2 keeps gathered weights until the backward",
    )
    parser.add_argument(
        "--reduce",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of FSDP2's reduction",
    )
    parser.add_argument(
        "--cudnn",
        action="store_true",
        help="cuDNN's attention even where PyTorch prefers another",
    )
    parser.add_argument(
        "--async-tp",
        action="store_true",
        help="overlap tensor parallelism's collectives with its matmuls",
    )
    return parser.parse_args()


class Peer(LlamaForCausalLM):
    """Hugging Face's own layers in its own order, from tokens to the loss; masks are implicit."""

    def forward(self, tokens):
        """Mean loss of [rows, length + 1] tokens."""
        inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
        hidden = self.model.embed_tokens(inputs)
        positions = torch.arange(inputs.shape[1], device=tokens.device)[None]
        rotary = self.model.rotary_emb(hidden, positions)
        for layer in self.model.layers:
            hidden = layer(hidden, position_embeddings=rotary)
        logits = self.lm_head(self.model.norm(hidden))
        return self.loss_function(logits, None, self.vocab_size, shift_labels=labels)


def shard_tensors(llama, mesh):
    """torchtitan's plan for Llama: sequence-sharded norms, vocabulary-parallel head and loss."""
    sequence, whole = Shard(1), Replicate()
    norm = parallel.SequenceParallel()
    column = parallel.ColwiseParallel()
    row = parallel.RowwiseParallel(output_layouts=sequence)
    layer_plan = {
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        "self_attn": parallel.PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": sequence},
            desired_input_kwarg_layouts={"hidden_states": whole},
        ),
        "self_attn.q_proj": column,
        "self_attn.k_proj": column,
        "self_attn.v_proj": column,
        "self_attn.o_proj": row,
        "mlp": parallel.PrepareModuleInput(input_layouts=sequence, desired_input_layouts=whole),
        "mlp.gate_proj": column,
        "mlp.up_proj": column,
        "mlp.down_proj": row,
    }
    plan = {f"model.layers.*.{name}": style for name, style in layer_plan.items()}
    plan["model.norm"] = norm
    plan["model.embed_tokens"] = parallel.RowwiseParallel(
        input_layouts=whole, output_layouts=sequence
    )
    plan["lm_head"] = parallel.ColwiseParallel(
        input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False
    )
    parallel.parallelize_module(llama, mesh, plan)


def shard_data(llama, mesh, options):
    """FSDP2 as torchtitan applies it; each layer is compiled.

    Over a mesh of 1 it only keeps float32 masters and computes in bfloat16.
    """
    reduction = getattr(torch, options.reduce)
    settings = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduction))
    frees_weights = options.zero == 3 and mesh.size() > 1
    for layer in llama.model.layers:
        layer.compile()
        fully_shard(layer, **settings, reshard_after_forward=frees_weights)
    for part in (llama.model.embed_tokens, [llama.model.norm, llama.lm_head], llama):
        fully_shard(part, **settings, reshard_after_forward=False)


def make_model(options, mesh, device):
    """The sharded model and the tokens of all processes together."""
    torch.manual_seed(0)
    with device:
        llama = Peer(LlamaConfig(**LLAMA | MODELS[options.model]))
        size = (options.rows, options.length + 1)
        tokens = torch.randint(0, llama.vocab_size, size)
    if options.mode == "tensor":
        shard_tensors(llama, mesh["tensor"])
    if options.async_tp:
        torch._inductor.config._micro_pipeline_tp = True
        _symmetric_memory.enable_symm_mem_for_group(mesh["tensor"].get_group().group_name)
    llama.loss_function = torch.compile(llama.loss_function)
    llama.model.norm.compile()
    shard_data(llama, mesh["data"], options)
    return llama, tokens


def train_step(llama, tokens, optimizer):
    """Forward, backward, clipping and update; returns the loss on the device."""
    with parallel.loss_parallel():  # concerns tensor parallelism's logits alone
        loss = llama(tokens)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def main():
    """Warm up, time, and print the figures in the first process."""
    options = parse_arguments()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ["WORLD_SIZE"])
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
    accelerator = torch.get_device_module(kind)
    accelerator.set_device(device)
    torch.backends.cuda.enable_flash_sdp(not options.cudnn)
    sizes = (world, 1) if options.mode == "fsdp" else (1, world)
    mesh = dist.device_mesh.init_device_mesh(kind, sizes, mesh_dim_names=("data", "tensor"))
    llama, tokens = make_model(options, mesh, device)
    tokens = tokens.chunk(sizes[0])[dist.get_rank() % sizes[0]]
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=True)
    for number in range(WARMUP_STEPS + options.steps):
        if number == WARMUP_STEPS:
            accelerator.synchronize()
            began = time.perf_counter()
        loss = train_step(llama, tokens, optimizer)
    accelerator.synchronize()
    ms = (time.perf_counter() - began) / options.steps * 1e3
    loss = loss.full_tensor() if options.mode == "tensor" else loss
    dist.all_reduce(loss)
    figures = {
        "ms": ms,
        "tokens_per_second": options.rows * options.length / ms * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": loss.item() / world,
    }
    if dist.get_rank() == 0:
        print(json.dumps({"peer": "torch"} | vars(options) | figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
