"""Whether DeepSpeed itself loads the universal folders that jaxscale writes, on CPUs.

Needs torch and deepspeed (0.19.8 was used). The folder is written first, then loaded on 2 ranks:
    jaxscale checkpoint convert tests/checkpoint/fixtures/deepspeed/zero_3/step3 /tmp/universal \\
        --to deepspeed --step 3
    for stage in 1 2 3; do DS_ACCELERATOR=cpu python experiments/checkpoints/deepspeed_loads.py \\
        /tmp/universal $stage tests/checkpoint/fixtures/deepspeed/zero_3/oracle.npz; done
Prints how many arrays are, bit by bit, those of the oracle, and takes one more step.
"""

import os
import sys

import numpy as np
import torch
import torch.multiprocessing as mp

NUM_RANKS, DIM, VOCAB = 2, 4, 7


def load(rank: int, folder: str, stage: int, oracle: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "MASTER_PORT": 29530}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(n) for name, n in place.items()})
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    layers = [torch.nn.Embedding(VOCAB, DIM), torch.nn.Linear(DIM, DIM), torch.nn.LayerNorm(DIM)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(DIM, VOCAB, bias=False))
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    config |= {"bf16": {"enabled": True}, "checkpoint": {"load_universal": True}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.load_checkpoint(folder)
    wanted, num_equal = dict(np.load(oracle)), 0
    for name, parameter in engine.module.named_parameters():
        found = {"fp32": safe_get_full_fp32_param(parameter)}
        for state in ("exp_avg", "exp_avg_sq"):
            found[state] = safe_get_full_optimizer_state(parameter, state)
        for state, tensor in found.items():
            whole = wanted[f"{state}/{name}"].reshape(tensor.shape)
            np.testing.assert_array_equal(tensor.detach().numpy(), whole)
            num_equal += 1
    tokens = torch.zeros(2, 5, dtype=torch.long)
    logits = engine(tokens).flatten(0, 1)
    engine.backward(torch.nn.functional.cross_entropy(logits, tokens.flatten()))
    engine.step()
    if rank == 0:
        print(f"stage {stage}: {num_equal} arrays are equal, steps {engine.global_steps}")


if __name__ == "__main__":
    mp.spawn(load, (sys.argv[1], int(sys.argv[2]), sys.argv[3]), nprocs=NUM_RANKS)
