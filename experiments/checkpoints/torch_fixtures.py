"""Files that torch itself writes on CPUs, for tests/checkpoint/fixtures/torch.

Needs torch (2.13.0 was used) and no GPU:
    python experiments/checkpoints/torch_fixtures.py tests/checkpoint/fixtures/torch
`distributed` is a distributed checkpoint of FSDP2 over tensor parallelism on 2 x 2 ranks, with
uneven shards, `tensors.pt` a file of `torch.save`; beside each are its arrays in an `.npz` file.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

NUM_RANKS = 4


def save_distributed(rank: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29520"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 3, bias=False))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": states, "step": 2}, checkpoint_id=folder)
    arrays = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, state in states["state"].items():
        arrays |= {f"optim.state.{name}.{kind}": tensor for kind, tensor in state.items()}
    write_oracle(folder.with_suffix(".npz"), arrays, is_writer=rank == 0)


def write_oracle(path: Path, tensors: dict, *, is_writer: bool = True) -> None:
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        is_known = full.dtype not in (torch.bfloat16, torch.float8_e4m3fn)
        whole[name] = (full if is_known else full.float()).detach().numpy()
    if is_writer:
        np.savez(path, **whole)


def save_tensors(path: Path) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "whole": whole,
        "view": whole[1:, 1:],
        "row": whole[1, 2],
        "permuted": whole.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "half": whole.to(torch.bfloat16),
        "eighth": whole.to(torch.float8_e4m3fn),
        "integers": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2, 2)),
    }
    tensors["view"] = tensors["view"].clone()
    torch.save({"tensors": tensors, "step": 3, "names": ["a", ("b", None)]}, path)
    write_oracle(path.with_suffix(".npz"), tensors)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    save_tensors(root / "tensors.pt")
    mp.spawn(save_distributed, (root / "distributed",), nprocs=NUM_RANKS)
