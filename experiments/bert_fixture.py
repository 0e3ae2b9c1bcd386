"""Write the tests' fixture of BERT: a tiny random model of Hugging Face with both heads' logits.

Needs torch and transformers; the tests need neither. Weights are random bfloat16, logits float32.
Command: python experiments/bert_fixture.py"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForPreTraining

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "convert" / "fixtures" / "bert"
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}


def main(folder=FOLDER):
    """A folder, no weight at a value that would hide it; logits without types and with them."""
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, attn_implementation="eager")
    model = BertForPreTraining(config).eval()
    for path, parameter in model.named_parameters():
        mean = float(path.endswith("LayerNorm.weight"))
        parameter.data = (mean + 0.2 * torch.randn(parameter.shape)).bfloat16().float()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 97, (2, 24)))
    with torch.no_grad():
        plain = model(tokens).prediction_logits.numpy()
        with_types = model(tokens, token_type_ids=tokens % 2)
        pooled = model.bert(tokens).pooler_output.numpy()
    typed, pair = (each.numpy() for each in with_types[:2])
    model.bfloat16().save_pretrained(folder)
    arrays = {"tokens": tokens.numpy(), "logits_24": plain, "typed": typed}
    arrays |= {"pooled": pooled, "pair": pair}
    np.savez_compressed(Path(folder) / "logits.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
