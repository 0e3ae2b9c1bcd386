"""A peer on long sequences: Hugging Face Llama 1.1B under DeepSpeed's own Ulysses and ZeRO-3; prints one JSON line.

torchrun --standalone --nproc-per-node 2 experiments/bench/deepspeed_ulysses_step.py --length 32768
--tiled loss
"""

import argparse
import json
import os
import time

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel import ulysses_sp
from transformers.models.llama import modeling_llama

LLAMA = dict(
    vocab_size=32064, intermediate_size=8192, num_key_value_heads=8, attn_implementation="sdpa"
)
WIDE = dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16)
TINY = dict(hidden_size=512, num_hidden_layers=2, num_attention_heads=8)
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--length", type=int, default=32768, help="of the one sequence that all processes share"
)
parser.add_argument(
    "--tiled",
    choices=("no", "loss", "all"),
    default="loss",
    help="DeepSpeed's tiles: loss, and MLP",
)
for name, default in (("--warmup", 2), ("--steps", 5)):
    parser.add_argument(name, type=int, default=default)
parser.add_argument(
    "--cudnn", action="store_true", help="cuDNN's attention even where PyTorch prefers another"
)
parser.add_argument(
    "--memory-gib", type=float, help="let PyTorch take at most this much of each GPU"
)
parser.add_argument(
    "--tiny", action="store_true", help="a model for trying this file without a GPU"
)
options = parser.parse_args()


class Peer(modeling_llama.LlamaForCausalLM):
    """Hugging Face's Llama, whose loss may come from DeepSpeed's tiles, 4,096 tokens each."""

    def forward(self, input_ids, position_ids, shift_labels):
        """Mean loss of this process's [1, length / processes] part of the sequence."""
        hidden = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        if options.tiled == "no":
            return self.loss_function(
                self.lm_head(hidden), None, self.vocab_size, shift_labels=shift_labels
            )
        tiles, loss = max(hidden.shape[1] // 4096, 1), ulysses_sp.TiledFusedLogitsLoss.apply
        return loss(
            tile_loss, self, hidden, shift_labels, None, tiles, [self.lm_head.weight], "mean"
        )


def tile_loss(model, hidden, labels):
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels)


def tiled_mlp(self, hidden):
    """The MLP in tiles as long as the model is wide, as DeepSpeed's documentation writes it."""
    tiles = -(-hidden.shape[1] // hidden.shape[2])
    return ulysses_sp.TiledMLP.apply(whole_mlp, self, hidden, tiles, list(self.parameters()))


whole_mlp = modeling_llama.LlamaMLP.forward
if options.tiled == "all":
    modeling_llama.LlamaMLP.forward = tiled_mlp
deepspeed.init_distributed()
rank, local, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
(accelerator := deepspeed.get_accelerator()).set_device(local)
device = accelerator.current_device_name()
torch.backends.cuda.enable_flash_sdp(not options.cudnn)


def run():
    """Builds, warms up and times; returns milliseconds a step and this process's loss."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Peer(modeling_llama.LlamaConfig(**LLAMA, **(TINY if options.tiny else WIDE)))
        tokens = torch.randint(0, model.vocab_size, (1, options.length + 1))
    model.gradient_checkpointing_enable()
    register = ulysses_sp.UlyssesSPAttentionHF.register_with_transformers
    mpu = register(model, "sdpa", world, 1, seq_length=options.length, seq_length_is_variable=False)
    settings = dict(
        train_micro_batch_size_per_gpu=1, bf16={"enabled": True}, zero_optimization={"stage": 3}
    )
    settings |= dict(sequence_parallel_size=world, gradient_clipping=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)
    tokens, labels = (each.chunk(world, 1)[rank] for each in (tokens[:, :-1], tokens[:, 1:]))
    positions = torch.arange(options.length, device=device)[None].chunk(world, 1)[rank].contiguous()
    for number in range(options.warmup + options.steps):
        if number == options.warmup:
            accelerator.synchronize()
            began = time.perf_counter()
        loss = engine(tokens, positions, labels.contiguous())
        engine.backward(loss)
        engine.step()
    accelerator.synchronize()
    return (time.perf_counter() - began) / options.steps * 1e3, loss.item()


if options.memory_gib:
    torch.cuda.set_per_process_memory_fraction(
        options.memory_gib * 2**30 / torch.cuda.mem_get_info()[1]
    )
try:
    ms, loss = run()
except torch.OutOfMemoryError as error:
    print(
        json.dumps(
            {"peer": "deepspeed"} | vars(options) | {"out_of_memory": str(error).split(". ")[0]}
        ),
        flush=True,
    )
    os._exit(1)  # the other process waits in a collective: the launcher ends it
figures = torch.tensor([ms, torch.cuda.max_memory_allocated() / 2**30, loss], device=device) / world
torch.distributed.all_reduce(figures)  # means over the processes
ms, peak, loss = figures.tolist()
figures = dict(ms=ms, tokens_per_second=options.length / ms * 1e3, peak_gib=peak, loss=loss)
print(json.dumps({"peer": "deepspeed"} | vars(options) | figures)) if rank == 0 else None
torch.distributed.destroy_process_group()
