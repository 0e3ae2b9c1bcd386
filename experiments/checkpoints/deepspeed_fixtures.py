r"""Checkpoints that DeepSpeed itself writes on CPUs, for tests/checkpoint/fixtures/deepspeed.

Needs torch and deepspeed (0.19.8 was used) and no GPU:
    DS_ACCELERATOR=cpu python experiments/checkpoints/deepspeed_fixtures.py \
        tests/checkpoint/fixtures/deepspeed
Of each ZeRO stage it keeps what `save_checkpoint` wrote on 3 ranks, and in `oracle.npz` what
DeepSpeed's own conversion to a universal folder makes of it; that of stages 1 and 3 is kept.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

NUM_RANKS, DIM, VOCAB = 3, 4, 7  # uneven; a norm has elements for two of three ranks alone
PRECISION = {1: "bf16", 2: None, 3: "bf16"}
CONVERT = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]


def train(rank: int, stage: int, folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "MASTER_PORT": 29510}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(n) for name, n in place.items()})
    import deepspeed

    torch.manual_seed(0)
    layers = [torch.nn.Embedding(VOCAB, DIM), torch.nn.Linear(DIM, DIM), torch.nn.LayerNorm(DIM)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(DIM, VOCAB, bias=False))
    groups = [{"params": [p for p in model.parameters() if p.ndim == n]} for n in (2, 1)]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if PRECISION[stage]:
        config[PRECISION[stage]] = {"enabled": True}
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    draw = torch.Generator().manual_seed(rank)
    for _ in range(3):
        tokens = torch.randint(0, VOCAB, (2, 5), generator=draw)
        logits = engine(tokens).flatten(0, 1)
        engine.backward(torch.nn.functional.cross_entropy(logits, tokens.flatten()))
        engine.step()
    engine.save_checkpoint(str(folder), tag="step3")


if __name__ == "__main__":
    for stage in (1, 2, 3):
        root = Path(sys.argv[1]) / f"zero_{stage}"
        shutil.rmtree(root, ignore_errors=True)
        mp.spawn(train, (stage, root), nprocs=NUM_RANKS)
        tag, universal = root / "step3", root / "step3_universal"
        folders = ["--input_folder", str(tag), "--output_folder", str(universal)]
        subprocess.run([*CONVERT, *folders], check=True)
        states = {}
        for path in sorted((universal / "zero").glob("*/[fe]*.pt")):
            content = torch.load(path, weights_only=False)
            tensor = content["param"] if isinstance(content, dict) else content
            states[f"{path.stem}/{path.parent.name}"] = tensor.detach().float().numpy()
        np.savez(root / "oracle.npz", **states)
        for script in root.glob("*.py"):
            script.unlink()
        if stage == 2:
            shutil.rmtree(universal)
            (root / "latest_universal").unlink()
