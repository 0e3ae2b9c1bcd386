"""Write tests/models/fixtures: tiny models of Hugging Face with their logits; tests need no torch.

Needs torch and transformers. Weights are random, with values of float16; logits are float32.

python experiments/huggingface_fixtures.py
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "models" / "fixtures"
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}


def write_logits(name, kind, fields):
    """The state of a model, no weight at a value that would hide it, and logits of two rows."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for path, parameter in model.named_parameters():
        mean = float("norm" in path and path.endswith("weight"))
        parameter.data = (mean + 0.2 * torch.randn(parameter.shape)).half().float()
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 24))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    state = {path: p.numpy().astype("float16") for path, p in model.state_dict().items()}
    np.savez_compressed(FOLDER / f"{name}.npz", tokens=tokens, logits=logits, **state)


def frequencies(head_dim, rope_parameters):
    """Frequencies of rotary positions, and the factor on their sines and cosines at the end."""
    shape = {"hidden_size": head_dim, "num_attention_heads": 1, "max_position_embeddings": 131072}
    config = transformers.LlamaConfig(**shape, rope_parameters=rope_parameters)
    found, factor = ROPE_INIT_FUNCTIONS[rope_parameters["rope_type"]](config, "cpu")
    return np.array([*found.tolist(), factor])


if __name__ == "__main__":
    for name, family in json.loads((FOLDER / "families.json").read_text()).items():
        write_logits(name, family["class"], family["fields"])
    cases = json.loads((FOLDER / "rotary.json").read_text())
    found = {name: frequencies(**case) for name, case in cases.items()}
    np.savez_compressed(FOLDER / "rotary.npz", **found)
