r"""Experts and pipeline stages that DeepSpeed writes on CPUs, for tests/checkpoint/fixtures.

Needs torch and deepspeed (0.19.8 was used) and no GPU:
    DS_ACCELERATOR=cpu python experiments/checkpoints/deepspeed_rank_fixtures.py \
        tests/checkpoint/fixtures/deepspeed
Of a mixture with 4 experts on 4 data ranks, of which 2 share each, under ZeRO 1 and 2, and of a
pipeline module with a tied embedding on 2 stages by 2 data ranks it keeps what `save_checkpoint`
wrote, and in `oracle.npz` what the ranks have in memory, put together by the places that
DeepSpeed's engine gives their fragments. Each has frozen biases.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

NUM_RANKS, DIM, VOCAB, ROWS, EXPERTS = 4, 4, 7, (2, 5), "deepspeed_experts."
STATES = ("exp_avg", "exp_avg_sq")


def loss_of(logits, tokens):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


class FrozenBias(torch.nn.Linear):
    def __init__(self):
        super().__init__(DIM, DIM)
        self.bias.requires_grad_(False)


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.embed = torch.nn.Embedding(VOCAB, DIM)
        settings = {"num_experts": 4, "ep_size": 2, "min_capacity": 8, "use_rts": False}
        self.moe = MoE(hidden_size=DIM, expert=FrozenBias(), **settings)
        self.head = torch.nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        return self.head(hidden + self.moe(hidden)[0])


def train_mixture(config, batches):
    import deepspeed
    from deepspeed.moe import utils

    model = Mixture()
    groups = {"params": list(model.parameters()), "name": "all"}
    groups = utils.split_params_into_different_moe_groups_for_optimizer(groups)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(3):
        tokens = next(batches)
        engine.backward(loss_of(engine(tokens), tokens))
        engine.step()
    return engine, deepspeed.utils.groups._get_expert_parallel_rank("ep_size_2")


def train_pipeline(config, batches):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    def head(layer, hidden):
        return torch.nn.functional.linear(hidden, layer.weight)

    embed = ("embed", torch.nn.Embedding, VOCAB, DIM)
    inner = [LayerSpec(FrozenBias), LayerSpec(torch.nn.LayerNorm, DIM)]
    layers = [TiedLayerSpec(*embed), *inner, TiedLayerSpec(*embed, forward_fn=head)]
    module = PipelineModule(layers, 2, loss_fn=loss_of, partition_method="uniform")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    for _ in range(3):
        engine.train_batch((tokens, tokens) for tokens in batches)
    return engine, 0


def fragments(engine, expert_rank):
    """(state and name in the model, shape, first element, values) of what this rank holds."""
    zero = engine.optimizer
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
        states = {state: zero.optimizer.state[flat][state] for state in STATES}
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            name = name_in_model(engine.param_names[parameter], expert_rank)
            place, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
            for state, values in {"fp32": flat, **states}.items():
                held = values.detach().narrow(0, place.start, place.numel).numpy().copy()
                yield f"{state}/{name}", tuple(parameter.shape), start, held
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            held = parameter.detach().float().numpy().reshape(-1)
            yield f"fp32/{name_in_model(name, expert_rank)}", tuple(parameter.shape), 0, held


def name_in_model(name, expert_rank):
    before, separator, after = name.partition(EXPERTS)
    if not separator:
        return name
    number, _, rest = after.partition(".")
    return f"{before}{separator}{int(number) + 2 * expert_rank}.{rest}"


def put_together(every):
    whole = {}
    for name, shape, start, values in every:
        flat = whole.setdefault(name, np.full(shape, np.nan, np.float32)).reshape(-1)
        flat[start : start + values.size] = values
    assert not any(np.isnan(array).any() for array in whole.values())
    return whole


def save(rank, train, stage, folder):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "MASTER_PORT": 29511}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(n) for name, n in place.items()})
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": ROWS[0], "bf16": {"enabled": True}}
    config |= {"zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False}
    config |= {"zero_allow_untested_optimizer": True}
    draw = torch.Generator().manual_seed(rank)
    batches = iter(lambda: torch.randint(0, VOCAB, ROWS, generator=draw), None)
    engine, expert_rank = train(config, batches)
    engine.save_checkpoint(str(folder), tag="step3")
    gathered = [None] * NUM_RANKS
    torch.distributed.all_gather_object(gathered, list(fragments(engine, expert_rank)))
    if rank == 0:
        whole = put_together([fragment for held in gathered for fragment in held])
        np.savez(folder / "oracle.npz", **whole)
    torch.distributed.barrier()


if __name__ == "__main__":
    for name, train, stage in (
        ("experts_1", train_mixture, 1),
        ("experts_2", train_mixture, 2),
        ("stages_1", train_pipeline, 1),
    ):
        root = Path(sys.argv[1]) / name
        shutil.rmtree(root, ignore_errors=True)
        mp.spawn(save, (train, stage, root), nprocs=NUM_RANKS)
        for script in root.glob("*.py"):
            script.unlink()
