r"""Buffers of Megatron-LM's distributed optimizer, for tests/checkpoint/fixtures/megatron.

Needs torch and megatron-core (0.16.1 was used) and no GPU:
    python experiments/checkpoints/megatron_distributed_fixtures.py \
        tests/checkpoint/fixtures/megatron
A model in bfloat16 on 2 pipeline by 2 data ranks takes a step: `buckets` has tied embeddings and
small buckets, `buckets_experts` a mixture whose experts two ranks share out. It keeps what
Megatron-LM saves in its format "torch", and in `oracle.npz` what the optimizers of all data ranks
hold, put together by their own account of which part of each weight that is.
"""

import argparse
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from megatron_fixtures import NUM_RANKS, STEP, VOCAB, make_model, pretend_cuda

BUCKET, EXPERTS = 390, ".local_experts."


def make_optimizer(model):
    """After one step with gradients of chance."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    kinds = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    ddp = DistributedDataParallelConfig(**kinds, bucket_size=BUCKET, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, ddp, model)
    types = {"bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True}
    settings = OptimizerConfig(lr=1e-2, clip_grad=0.0, **types)
    made = get_megatron_optimizer(settings, [wrapped])
    for number, parameter in enumerate(model.parameters()):
        draw = torch.Generator().manual_seed(number)
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=draw))
    for one in made.chained_optimizers:
        one.prepare_grads()
        one.step_with_ready_grads()
    return made


def held_by(optimizers, model, stage, expert_rank):
    """(state and name in the model, shape, first element, values) of what this rank holds."""
    for name, parameter in model.named_parameters():
        for one in optimizers:
            if parameter not in one.model_param_gbuf_map:
                continue
            start = one._get_model_param_range_map(parameter)["param"].start
            for state, values in one._get_main_param_and_optimizer_states(parameter).items():
                if values.dim():
                    path = f"{state}/{in_model(name, stage, expert_rank)}".removeprefix("param/")
                    yield path, tuple(parameter.shape), start, values.detach().numpy().copy()


def in_model(name, stage, expert_rank):
    words = name.split(".")
    if "layers" in words:
        words[2] = str(int(words[2]) + 2 * stage)
    if EXPERTS in name:
        at = words.index("local_experts") + 1
        words[at] = str(int(words[at]) + 2 * expert_rank)
    return ".".join(words)


def put_together(every):
    whole = {}
    for name, shape, start, values in every:
        flat = whole.setdefault(name, np.full(shape, np.nan, np.float32)).reshape(-1)
        flat[start : start + values.size] = values.reshape(-1)
    assert not any(np.isnan(array).any() for array in whole.values())
    return whole


def save(rank, num_experts, folder):
    warnings.filterwarnings("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29543"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    from megatron.core import parallel_state

    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    split = {"expert_model_parallel_size": 2} if num_experts else {}
    parallel_state.initialize_model_parallel(1, 2, **split)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    expert = parallel_state.get_expert_model_parallel_rank()
    is_tied = not num_experts
    kinds = {"is_tied": is_tied, "num_experts": num_experts}
    model = make_model(torch.bfloat16, expert, stage, 1, **kinds)
    pretend_cuda()
    optimizer = make_optimizer(model)
    arguments = {"swiglu": True, "vocab_size": VOCAB, "data_parallel_size": 2}
    arguments |= {"overlap_grad_reduce": True, "ddp_bucket_size": BUCKET}
    arguments |= {"untie_embeddings_and_output_weights": not is_tied}
    content = {"iteration": STEP, "checkpoint_version": 3.0, "optimizer": optimizer.state_dict()}
    content |= {"args": argparse.Namespace(**arguments)}
    content |= {"model": model.state_dict_for_save_checkpoint()}
    words = ["mp_rank_00", f"{stage:03d}"] + [f"{expert:03d}"] * bool(num_experts)
    own = folder / f"iter_{STEP:07d}" / "_".join(words)
    own.mkdir(parents=True, exist_ok=True)
    if num_experts or parallel_state.get_data_parallel_rank() == 0:
        torch.save(content, own / "model_optim_rng.pt")
    optimizer.save_parameter_state(str(own / "distrib_optim.pt"))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    gathered = [None] * NUM_RANKS
    held = list(held_by(optimizer.chained_optimizers, model, stage, expert))
    torch.distributed.all_gather_object(gathered, held)
    if rank == 0:
        every = [part for parts in gathered for part in parts]
        np.savez(folder / "oracle.npz", **put_together(every))
    torch.distributed.barrier()


if __name__ == "__main__":
    for name, num_experts in (("buckets", None), ("buckets_experts", 4)):
        root = Path(sys.argv[1]) / name
        shutil.rmtree(root, ignore_errors=True)
        mp.spawn(save, (num_experts, root), nprocs=NUM_RANKS)
