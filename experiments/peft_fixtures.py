"""Write the tests' fixtures of adapters: folders of PEFT, with the logits of adapted models.

Needs torch, transformers and peft; the tests need none. The models are huggingface_fixtures.py's.

python experiments/peft_fixtures.py
"""

import json
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "convert" / "fixtures"
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}

if __name__ == "__main__":
    for name, targets in TARGETS.items():
        torch.manual_seed(1)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            FIXTURES / name, dtype=torch.float32, attn_implementation="eager"
        )
        config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config).eval()
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.data = 0.2 * torch.randn(parameter.shape)
        folder = FIXTURES / f"peft_{name}"
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        written = json.loads((folder / "adapter_config.json").read_text())
        written["base_model_name_or_path"] = name
        (folder / "adapter_config.json").write_text(json.dumps(written, indent=2))
        with np.load(FIXTURES / name / "logits.npz") as file:
            tokens = file["tokens"]
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits)
