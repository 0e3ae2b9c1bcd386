"""torch's distributed checkpoint of a state as large as that of `checkpoint.py`, on one device.

    python experiments/bench/checkpoint_torch.py --directory /tmp/bench --part save

The tensors are those of the Llama shape of experiments/configs/models/llama_1b.gin, three times:
weights and two moments. One process, gloo; memory is that of a process at rest. The part
`save` is asynchronous, beside steps; `write` is not; both load what they have written.
"""

import argparse
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from checkpoint_meter import measured, stall

FFN, VOCAB, HEADS, KEYS, WIDTH = 8192, 32064, 2048, 1024, 4096
NUM_WRITERS = 8


def draw(layers: int, dim: int, **kind) -> dict:
    shapes = {"q": (HEADS, dim), "k": (KEYS, dim), "v": (KEYS, dim), "o": (dim, HEADS)}
    shapes |= {"gate": (FFN, dim), "up": (FFN, dim), "down": (dim, FFN)}
    names = {f"{n}.{name}": shape for n in range(layers) for name, shape in shapes.items()}
    names |= {"embed": (VOCAB, dim), "head": (VOCAB, dim)}
    return {
        f"{part}.{name}": torch.randn(shape, **kind)
        for part in ("params", "mu", "nu")
        for name, shape in names.items()
    }


def make_step(state: dict, work: int) -> Callable[[], None]:
    """Matmuls and an update in place of the whole state."""
    tensors = list(state.values())
    matrix = torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16, device=tensors[0].device)

    def step() -> None:
        result = matrix
        for _ in range(work):
            result = torch.tanh(result @ matrix) * 0.01
        torch._foreach_mul_(tensors, 1.0)
        result.sum().item()

    return step


def run_save(state: dict, options: argparse.Namespace) -> None:
    step = make_step(state, options.work)
    saves = []

    def save() -> None:
        saves.append(dcp.async_save(state, checkpoint_id=options.directory))

    with measured("  torch, async_save: until committed"):
        stall("torch, async_save", step, save, options.steps)
        saves[0].result()
    run_load(state, options)


def run_write(state: dict, options: argparse.Namespace) -> None:
    """Several threads write, and nothing waits to be asynchronous."""
    with measured(f"torch, save by {NUM_WRITERS} threads"):
        writer = dcp.FileSystemWriter(options.directory, thread_count=NUM_WRITERS)
        dcp.save(state, storage_writer=writer)
    run_load(state, options)


def run_load(state: dict, options: argparse.Namespace) -> None:
    with measured("torch, load"):
        dcp.load(state, checkpoint_id=options.directory)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


PARTS = {"save": run_save, "write": run_write}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, default="save")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--work", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    state = draw(options.layers, options.dim, device=device, dtype=dtype)
    total = sum(tensor.nbytes for tensor in state.values())
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"torch: {total / 1e9:.2f} GB in {len(state)} tensors, {kind}", flush=True)
    shutil.rmtree(options.directory, ignore_errors=True)
    PARTS[options.part](state, options)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
