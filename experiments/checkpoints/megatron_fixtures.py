r"""Ranks of Megatron-LM with its optimizer's states, for tests/checkpoint/fixtures/megatron.

Needs torch and megatron-core (0.16.1 was used) and no GPU:
    python experiments/checkpoints/megatron_fixtures.py tests/checkpoint/fixtures/megatron
A model of megatron-core on 2 tensor by 2 pipeline ranks takes a step of its optimizer, in float32
and in bfloat16 with float32 masters. Its states are saved as Megatron-LM does in its format
"torch", and `oracle.npz` has what the ranks hold, put together by megatron-core's own account of
where it belongs. `torch_dist` is the same in its distributed format.
"""

import argparse
import itertools
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

NUM_RANKS, VOCAB, STEP = 4, 12, 3


def make_model(dtype, tensor, stage, num_tensor=2, *, is_tied=False, num_experts=None):
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 4, "hidden_size": 8, "ffn_hidden_size": 16}
    heads = {"num_attention_heads": 4, "num_query_groups": 2}
    degrees = {"tensor_model_parallel_size": num_tensor, "pipeline_model_parallel_size": 2}
    if num_experts:
        degrees |= {"num_moe_experts": num_experts, "expert_model_parallel_size": 2}
        degrees |= {"moe_ffn_hidden_size": 16, "moe_token_dispatcher_type": "allgather"}
    types = {"pipeline_dtype": dtype, "params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    gate = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    plain = {"use_cpu_initialization": True, "add_bias_linear": False, "normalization": "RMSNorm"}
    config = TransformerConfig(**sizes, **heads, **degrees, **types, **gate, **plain)
    torch.manual_seed(10 * tensor + stage)
    return GPTModel(
        config,
        gpt_layer_specs.get_gpt_layer_local_spec(num_experts, normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=8,
        pre_process=stage == 0,
        post_process=stage == 1,
        share_embeddings_and_output_weights=is_tied,
        position_embedding_type="rope",
    ).to(dtype)


def make_optimizer(model, dtype):
    """After one step with gradients of chance."""
    from megatron.core.optimizer import OptimizerConfig, _get_param_groups, optimizer

    settings = OptimizerConfig(lr=1e-2, bf16=dtype == torch.bfloat16, params_dtype=dtype)
    adam = torch.optim.AdamW(_get_param_groups([model], settings, None), lr=1e-2)
    if dtype == torch.float32:
        made = optimizer.FP32Optimizer(adam, settings, None)
    else:
        made = optimizer.Float16OptimizerWithFloat16Params(adam, settings, None, None)
    for group in adam.param_groups:
        for number, parameter in enumerate(group["params"]):
            draw = torch.Generator().manual_seed(number)  # equal for norms on all tensor ranks
            gradient = torch.randn(parameter.shape, generator=draw)
            parameter.grad = gradient.to(parameter.dtype)
    adam.step()
    return made


def pretend_cuda():
    """Its optimizers ask for CUDA tensors by name, and compute nothing that needs them."""
    make, kind = torch.tensor, torch.Tensor.type

    def named(tensor, *types):
        return kind(tensor, *types) if types else kind(tensor).replace("torch.", "torch.cuda.")

    torch.tensor = lambda *values, device=None, **others: make(*values, **others)
    torch.Tensor.type = named
    torch.cuda.synchronize = lambda: None
    torch.cuda.current_device = lambda: "cpu"


def flat(tree):
    """The sharded tensors in a state, those of fused weights apart."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(tree, ShardedTensorFactory):
        tree = tree.build()
    if isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from flat(value)


def put_together(every):
    whole = {}
    for key, shape, offset, values in every:
        array = whole.setdefault(key, np.full(shape, np.nan, np.float32))
        stacked = len(shape) - values.ndim
        sizes = (1,) * stacked + values.shape
        box = tuple(slice(start, start + size) for start, size in zip(offset, sizes))
        array[box] = values.reshape(sizes)
    return whole


def save(rank, dtype, folder):
    warnings.filterwarnings("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel(2, 2)
    tensor = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = make_model(dtype, tensor, stage)
    pretend_cuda()
    optimizer = make_optimizer(model, dtype)
    content = {"iteration": STEP, "checkpoint_version": 3.0, "optimizer": optimizer.state_dict()}
    content |= {"args": argparse.Namespace(swiglu=True, vocab_size=VOCAB)}
    content |= {"model": model.state_dict_for_save_checkpoint()}
    own = folder / f"iter_{STEP:07d}" / f"mp_rank_{tensor:02d}_{stage:03d}"
    own.mkdir(parents=True)
    torch.save(content, own / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    weights = model.sharded_state_dict()
    sharded = {"model": weights, "optimizer": optimizer.sharded_state_dict(weights)}
    held = []
    for part in flat(sharded):
        values = part.data.detach().float().numpy()
        held.append((part.key, part.global_shape, part.global_offset, values))
    gathered = [None] * NUM_RANKS
    torch.distributed.all_gather_object(gathered, held)
    if rank == 0:
        np.savez(folder / "oracle.npz", **put_together(itertools.chain(*gathered)))
        (folder / "torch_dist").mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(sharded, str(folder / "torch_dist"))


if __name__ == "__main__":
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        root = Path(sys.argv[1]) / name
        shutil.rmtree(root, ignore_errors=True)
        mp.spawn(save, (dtype, root), nprocs=NUM_RANKS)
