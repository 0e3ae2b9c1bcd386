r"""Megatron-LM's distributed optimizer in its format "torch_dist", for tests/checkpoint/fixtures.

Needs torch and megatron-core (0.16.1 was used) and no GPU:
    python experiments/checkpoints/megatron_buckets_fixtures.py tests/checkpoint/fixtures/megatron
A model in bfloat16 takes a step: `bucketed` on 2 tensor by 2 pipeline ranks, `bucketed_experts` on
2 pipeline by 2 data ranks, which share experts out. Its optimizer is saved in the buckets that it
has, which is what Megatron-LM does unless told otherwise. In `oracle.npz` is what all ranks hold
by their own account of which part of a weight that is, and of where the weight belongs.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from megatron_distributed_fixtures import EXPERTS, make_optimizer
from megatron_fixtures import NUM_RANKS, VOCAB, flat, make_model, pretend_cuda, put_together


def held_by(optimizer, model, place):
    """(place of the rank, name, state, first element, values) of what this rank holds."""
    for name, parameter in model.named_parameters():
        for one in optimizer.chained_optimizers:
            if parameter not in one.model_param_gbuf_map:
                continue
            start = one._get_model_param_range_map(parameter)["param"].start
            for state, values in one._get_main_param_and_optimizer_states(parameter).items():
                if values.dim():
                    own = place if EXPERTS in name else place[:2]
                    yield own, name, state, start, values.detach().numpy().copy()


def whole_states(every, model, weights, place):
    """This rank's states, whole over the data ranks, where they belong in the whole model."""
    sharded = {part.data: part for part in leaves(weights)}
    for name, parameter in model.named_parameters():
        own = place if EXPERTS in name else place[:2]
        parts = [part for part in every if part[:2] == (own, name)]
        for state in {part[2] for part in parts}:
            whole = np.full(parameter.numel(), np.nan, np.float32)
            for *_, found, start, values in parts:
                if found == state:
                    whole[start : start + values.size] = values
            values = torch.from_numpy(whole.reshape(parameter.shape))
            described = sharded[parameter]
            others = {} if hasattr(described, "build_fn") else {"dtype": values.dtype}
            key = f"optimizer.state.{state}.{described.key}"
            for part in flat(dataclasses.replace(described, key=key, data=values, **others)):
                yield part.key, part.global_shape, part.global_offset, part.data.numpy()


def leaves(tree):
    """The sharded tensors and factories of a state."""
    for value in tree.values():
        if hasattr(value, "key") and isinstance(getattr(value, "data", None), torch.Tensor):
            yield value


def save(rank, num_tensor, num_experts, folder):
    warnings.filterwarnings("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29547"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    from megatron.core import dist_checkpointing, parallel_state

    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    split = {"expert_model_parallel_size": 2} if num_experts else {}
    parallel_state.initialize_model_parallel(num_tensor, 2, **split)
    tensor = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    expert = parallel_state.get_expert_model_parallel_rank()
    seed = tensor + 2 * expert
    model = make_model(torch.bfloat16, seed, stage, num_tensor, num_experts=num_experts)
    pretend_cuda()
    optimizer = make_optimizer(model)
    kinds = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
    weights = model.sharded_state_dict(metadata=kinds)
    arguments = {"transformer_impl": "local", "vocab_size": VOCAB, "swiglu": True}
    arguments |= {"tensor_model_parallel_size": num_tensor, "pipeline_model_parallel_size": 2}
    arguments |= {"expert_model_parallel_size": 2 if num_experts else 1}
    place = tensor, stage, expert
    gathered = [None] * NUM_RANKS
    torch.distributed.all_gather_object(gathered, list(held_by(optimizer, model, place)))
    every = [part for parts in gathered for part in parts]
    held = [
        (part.key, part.global_shape, part.global_offset, part.data.detach().float().numpy())
        for part in flat(weights)
    ]
    held += whole_states(every, model, weights, place)
    torch.distributed.all_gather_object(gathered, held)
    content = {"args": argparse.Namespace(**arguments), "model": weights}
    content |= {"optimizer": optimizer.sharded_state_dict(weights, metadata=kinds)}
    if rank == 0:
        folder.mkdir(parents=True)
        every = [part for parts in gathered for part in parts]
        np.savez_compressed(folder / "oracle.npz", **put_together(every))
        (folder / "torch_dist").mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(content, str(folder / "torch_dist"))


if __name__ == "__main__":
    for name, *sizes in (("bucketed", 2, None), ("bucketed_experts", 1, 4)):
        root = Path(sys.argv[1]) / name
        shutil.rmtree(root, ignore_errors=True)
        mp.spawn(save, (*sizes, root), nprocs=NUM_RANKS)
