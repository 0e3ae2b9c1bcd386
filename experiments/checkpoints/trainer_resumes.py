r"""Whether the Trainer of Hugging Face goes on from a universal folder that jaxscale writes.

Needs torch, deepspeed, transformers and accelerate (0.19.8, 5.24.0 and 1.15.0 were used), no GPU:
    DS_ACCELERATOR=cpu python trainer_resumes.py /tmp/trainer                # trains and saves
    jaxscale checkpoint convert /tmp/trainer/checkpoint-3 /tmp/new --to deepspeed --step 3 \
        --learning_rate 0.005
    DS_ACCELERATOR=cpu python trainer_resumes.py /tmp/trainer --from /tmp/new --stage 2
The first run takes 6 steps under ZeRO 2 and saves the third; the second goes on from the converted
folder under any stage. Prints the losses of each.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

STEPS, SAVED, ROWS = 6, 3, 2


def trainer(folder: Path, stage: int, *, is_universal: bool):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    torch.manual_seed(0)
    texts = [{"input_ids": (row := torch.randint(0, 32, (8,))), "labels": row} for _ in range(64)]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": zero}
    config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    config |= {"checkpoint": {"load_universal": is_universal}}
    plan = {"max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1, "report_to": "none"}
    usual = {"use_cpu": True, "optim": "adamw_torch", "learning_rate": 1e-2, "disable_tqdm": True}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=ROWS, deepspeed=config, **plan, **usual
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return Trainer(model, arguments, train_dataset=texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--stage", type=int, default=2)
    options = parser.parse_args()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29560"}
    os.environ |= place | {"MASTER_ADDR": "127.0.0.1"}
    saved = options.folder / f"checkpoint-{SAVED}"
    if options.source is None:
        run = trainer(options.folder, options.stage, is_universal=False)
        run.train()
    else:
        # Beside DeepSpeed's files it reads its own, of the position in the data and the schedule.
        for file in [*saved.glob("*.json"), *saved.glob("scheduler.pt"), *saved.glob("rng*")]:
            shutil.copy(file, options.source)
        run = trainer(options.folder / "resumed", options.stage, is_universal=True)
        run.train(resume_from_checkpoint=str(options.source))
    losses = {line["step"]: line["loss"] for line in run.state.log_history if "loss" in line}
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
