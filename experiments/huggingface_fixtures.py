"""Write the tests' fixtures: folders of tiny models of Hugging Face with their logits.

Needs torch and transformers; the tests need neither. Weights are random bfloat16, logits float32.
Command: python experiments/huggingface_fixtures.py"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TESTS = Path(__file__).resolve().parents[1] / "tests"
FAMILIES, ROTARY = TESTS / "convert" / "fixtures", TESTS / "models" / "fixtures"
AROUND = {"vocab_size": 97, "attn_implementation": "eager", "experts_implementation": "eager"}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}


def write_model(folder, kind, fields, packed=False, is_bare=False, length=24, lengths=()):
    """A folder, no weight at a value that would hide it; logits of two rows and of prefixes."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**AROUND | ({} if is_bare else SHAPE) | fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for path, parameter in model.named_parameters():
        mean = float(("norm" in path or "ln_" in path) and path.endswith("weight"))
        parameter.data = (mean + 0.2 * torch.randn(parameter.shape)).bfloat16().float()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 97, (2, length)))
    with torch.no_grad():
        logits = {f"logits_{n}": model(tokens[:, :n]).logits.numpy() for n in (*lengths, length)}
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": min(8, length - 12)}
    mask = torch.ones(1, 12)  # else what has the number of the padding token is masked
    logits["greedy"] = model.generate(tokens[:1, :12], attention_mask=mask, **greedy).numpy()
    model.bfloat16().save_pretrained(folder, save_original_format=not packed)
    (folder / "generation_config.json").unlink()
    np.savez_compressed(folder / "logits.npz", tokens=tokens.numpy(), **logits)


def frequencies(head_dim, rope_parameters):
    """Frequencies of rotary positions, and the factor on their sines and cosines at the end."""
    shape = {"hidden_size": head_dim, "num_attention_heads": 1, "max_position_embeddings": 131072}
    config = transformers.LlamaConfig(**shape, rope_parameters=rope_parameters)
    found, factor = ROPE_INIT_FUNCTIONS[rope_parameters["rope_type"]](config, "cpu")
    return np.array([*found.tolist(), factor])


if __name__ == "__main__":
    for name, family in json.loads((FAMILIES / "families.json").read_text()).items():
        write_model(FAMILIES / name, family.pop("class"), **family)
    cases = json.loads((ROTARY / "rotary.json").read_text())
    found = {name: frequencies(**case) for name, case in cases.items()}
    np.savez_compressed(ROTARY / "rotary.npz", **found)
