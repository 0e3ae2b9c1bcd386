"""A peer on long sequences: Hugging Face Llama 1.1B under DeepSpeed's own Ulysses and ZeRO-3.

Prints one JSON line.

torchrun --standalone --nproc-per-node 2 \\
    experiments/bench/deepspeed_ulysses_step.py --length 32768 --tiled loss
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
    vocab_size=32064,
    intermediate_size=8192,
    num_key_value_heads=8,
    attn_implementation="sdpa",
)
WIDE = dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16)
TINY = dict(hidden_size=512, num_hidden_layers=2, num_attention_heads=8)
LOSS_TILE = 4096  # tokens


def parse_arguments():
    """The command line."""
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
        help="DeepSpeed's tiles: of the loss, and of the MLP too",
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--cudnn",
        action="store_true",
        help="cuDNN's attention even where PyTorch prefers another",
    )
    parser.add_argument(
        "--memory-gib", type=float, help="let PyTorch take at most this much of each GPU"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a model for trying this file without a GPU"
    )
    return parser.parse_args()


class Peer(modeling_llama.LlamaForCausalLM):
    """Hugging Face's Llama, whose loss may come from DeepSpeed's tiles."""

    def forward(self, input_ids, position_ids, shift_labels):
        """Mean loss of this process's [1, length / processes] part of the sequence."""
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = output.last_hidden_state
        if not self.is_loss_tiled:
            logits = self.lm_head(hidden)
            return self.loss_function(logits, None, self.vocab_size, shift_labels=shift_labels)
        num_tiles = max(hidden.shape[1] // LOSS_TILE, 1)
        return ulysses_sp.TiledFusedLogitsLoss.apply(
            tile_loss,
            self,
            hidden,
            shift_labels,
            None,
            num_tiles,
            [self.lm_head.weight],
            "mean",
        )


def tile_loss(model, hidden, labels):
    """Mean loss of one tile."""
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels)


def tile_mlps():
    """Run each MLP in tiles as long as the model is wide, as in DeepSpeed's documentation."""
    whole_mlp = modeling_llama.LlamaMLP.forward

    def tiled_mlp(self, hidden):
        num_tiles = -(-hidden.shape[1] // hidden.shape[2])
        return ulysses_sp.TiledMLP.apply(
            whole_mlp, self, hidden, num_tiles, list(self.parameters())
        )

    modeling_llama.LlamaMLP.forward = tiled_mlp


def make_engine(options, model, world):
    """DeepSpeed's engine over a model: bfloat16, ZeRO-3, Ulysses over all processes."""
    model.gradient_checkpointing_enable()
    mpu = ulysses_sp.UlyssesSPAttentionHF.register_with_transformers(
        model,
        "sdpa",
        world,
        1,
        seq_length=options.length,
        seq_length_is_variable=False,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "sequence_parallel_size": world,
        "gradient_clipping": 1.0,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    return engine


def run(options, rank, world):
    """Build, warm up and time; (milliseconds a step, this process's loss)."""
    accelerator = deepspeed.get_accelerator()
    device = accelerator.current_device_name()
    torch.manual_seed(0)
    with torch.device(device):
        shape = TINY if options.tiny else WIDE
        model = Peer(modeling_llama.LlamaConfig(**LLAMA, **shape))
        tokens = torch.randint(0, model.vocab_size, (1, options.length + 1))
        positions = torch.arange(options.length)[None]
    model.is_loss_tiled = options.tiled != "no"
    engine = make_engine(options, model, world)
    inputs = tokens[:, :-1].chunk(world, 1)[rank]
    labels = tokens[:, 1:].chunk(world, 1)[rank].contiguous()
    positions = positions.chunk(world, 1)[rank].contiguous()
    for number in range(options.warmup + options.steps):
        if number == options.warmup:
            accelerator.synchronize()
            began = time.perf_counter()
        loss = engine(inputs, positions, labels)
        engine.backward(loss)
        engine.step()
    accelerator.synchronize()
    return (time.perf_counter() - began) / options.steps * 1e3, loss.item()


def limit_memory(gib):
    """Let PyTorch take at most so much of the GPU."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)


def main():
    """Run, and print the means over the processes in the first one."""
    options = parse_arguments()
    if options.tiled == "all":
        tile_mlps()
    deepspeed.init_distributed()
    rank, local, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    accelerator = deepspeed.get_accelerator()
    accelerator.set_device(local)
    torch.backends.cuda.enable_flash_sdp(not options.cudnn)
    if options.memory_gib:
        limit_memory(options.memory_gib)
    head = {"peer": "deepspeed"} | vars(options)
    try:
        ms, loss = run(options, rank, world)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        print(json.dumps(head | {"out_of_memory": reason}), flush=True)
        os._exit(1)  # the other process waits in a collective: the launcher ends it
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    device = accelerator.current_device_name()
    figures = torch.tensor([ms, peak_gib, loss], device=device) / world
    torch.distributed.all_reduce(figures)
    ms, peak_gib, loss = figures.tolist()
    if rank == 0:
        rate = options.length / ms * 1e3
        figures = dict(ms=ms, tokens_per_second=rate, peak_gib=peak_gib, loss=loss)
        print(json.dumps(head | figures))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
