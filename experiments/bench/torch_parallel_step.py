"""The peer of train_step.py on several GPUs: Hugging Face Llama under FSDP2 or tensor parallelism; one JSON line.

torchrun --standalone --nproc-per-node 2 experiments/bench/torch_parallel_step.py fsdp --model 1b
--rows 8
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
    vocab_size=32064, intermediate_size=8192, num_key_value_heads=8, attn_implementation="sdpa"
)
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
MODELS = {"1b": (2048, 16, 16), "3b": (3072, 28, 24), "tiny": (512, 2, 8)}
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("mode", choices=("fsdp", "tensor"))
parser.add_argument("--model", choices=MODELS, default="1b")
for name, default in (("--rows", 8), ("--length", 4096), ("--steps", 10)):
    parser.add_argument(name, type=int, default=default)
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
    "--cudnn", action="store_true", help="cuDNN's attention even where PyTorch prefers another"
)
parser.add_argument(
    "--async-tp",
    action="store_true",
    help="overlap tensor parallelism's collectives with its matmuls",
)
options = parser.parse_args()


class Peer(LlamaForCausalLM):
    """Hugging Face's own layers in its own order, from tokens to the loss; masks are implicit."""

    def forward(self, tokens):
        hidden = self.model.embed_tokens(tokens[:, :-1])
        rotary = self.model.rotary_emb(
            hidden, torch.arange(options.length, device=tokens.device)[None]
        )
        for layer in self.model.layers:
            hidden = layer(hidden, position_embeddings=rotary)
        logits = self.lm_head(self.model.norm(hidden))
        return self.loss_function(
            logits, None, self.vocab_size, shift_labels=tokens[:, 1:].contiguous()
        )


def shard_tensors(llama, mesh):
    """torchtitan's plan for Llama: sequence-sharded norms, vocabulary-parallel embedding, head and loss."""
    sequence, whole, norm = Shard(1), Replicate(), parallel.SequenceParallel()
    column, row = parallel.ColwiseParallel(), parallel.RowwiseParallel(output_layouts=sequence)
    names = dict(
        input_kwarg_layouts={"hidden_states": sequence},
        desired_input_kwarg_layouts={"hidden_states": whole},
    )
    plan = {
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        "self_attn.o_proj": row,
        "mlp.down_proj": row,
    }
    plan["self_attn"] = parallel.PrepareModuleInput(**names)
    plan["mlp"] = parallel.PrepareModuleInput(input_layouts=sequence, desired_input_layouts=whole)
    plan |= {
        f"{name}_proj": column
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    }
    plan = {f"model.layers.*.{name}": style for name, style in plan.items()} | {"model.norm": norm}
    plan["model.embed_tokens"] = parallel.RowwiseParallel(
        input_layouts=whole, output_layouts=sequence
    )
    head = parallel.ColwiseParallel(
        input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False
    )
    parallel.parallelize_module(llama, mesh, plan | {"lm_head": head})


kind, world = "cuda" if torch.cuda.is_available() else "cpu", int(os.environ["WORLD_SIZE"])
device, module = torch.device(kind, int(os.environ["LOCAL_RANK"])), torch.get_device_module(kind)
module.set_device(device)
sizes = (world, 1) if options.mode == "fsdp" else (1, world)
mesh = dist.device_mesh.init_device_mesh(kind, sizes, mesh_dim_names=("data", "tensor"))
torch.manual_seed(0)
torch.backends.cuda.enable_flash_sdp(not options.cudnn)
with device:
    llama = Peer(LlamaConfig(**LLAMA, **dict(zip(NAMES, MODELS[options.model], strict=True))))
    tokens = torch.randint(0, llama.vocab_size, (options.rows, options.length + 1))
if options.mode == "tensor":
    shard_tensors(llama, mesh["tensor"])
if options.async_tp:
    torch._inductor.config._micro_pipeline_tp = True
    _symmetric_memory.enable_symm_mem_for_group(mesh["tensor"].get_group().group_name)
llama.loss_function = torch.compile(llama.loss_function)
llama.model.norm.compile()
# FSDP2 as torchtitan applies it; over a mesh of 1 it only keeps float32 masters and computes in
# bfloat16
settings = dict(
    mesh=mesh["data"],
    mp_policy=MixedPrecisionPolicy(torch.bfloat16, getattr(torch, options.reduce)),
)
for layer in llama.model.layers:
    layer.compile()
    fully_shard(layer, **settings, reshard_after_forward=options.zero == 3 and sizes[0] > 1)
for part in (llama.model.embed_tokens, [llama.model.norm, llama.lm_head], llama):
    fully_shard(part, **settings, reshard_after_forward=False)
optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=True)
for number in range(5 + options.steps):
    if number == 5:
        began = module.synchronize() or time.perf_counter()
    with parallel.loss_parallel():  # concerns tensor parallelism's logits alone
        loss = llama(tokens.chunk(sizes[0])[dist.get_rank() % sizes[0]])
        loss.backward()
    torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
module.synchronize()
ms = (time.perf_counter() - began) / options.steps * 1e3
dist.all_reduce(loss := loss.detach().full_tensor() if options.mode == "tensor" else loss.detach())
peak, loss = torch.cuda.max_memory_allocated() / 2**30, loss.item() / world
figures = dict(
    ms=ms, tokens_per_second=options.rows * options.length / ms * 1e3, peak_gib=peak, loss=loss
)
print(json.dumps({"peer": "torch"} | vars(options) | figures)) if dist.get_rank() == 0 else None
dist.destroy_process_group()
