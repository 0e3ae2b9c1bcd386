"""Write the tests' fixture of modules: OpenFold's code in transformers' ESMFold, with gradients.

Needs torch and transformers; the tests need neither. Attention is of more queries than keys, with
both biases; pairs have arbitrary masks and a row of which no key is seen.

python experiments/evoformer/esmfold_fixture.py
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers.models.esm import modeling_esmfold as esmfold

FILE = Path(__file__).resolve().parents[2] / "tests/models/evoformer/fixtures/esmfold.npz"
RESIDUES, WIDTH, HEADS, HEAD_DIM, ROWS, KEYS = 7, 10, 3, 5, 4, 6
NAMES = {  # of theirs, ours; a linear layer of theirs has its outputs first
    "layer_norm.weight": "norm/scale",
    "layer_norm.bias": "norm/bias",
    "layer_norm_in.weight": "norm/scale",
    "layer_norm_in.bias": "norm/bias",
    "layer_norm_out.weight": "product_norm/scale",
    "layer_norm_out.bias": "product_norm/bias",
    "linear.weight": "pair_bias",
    "mha.linear_q.weight": "q",
    "mha.linear_k.weight": "k",
    "mha.linear_v.weight": "v",
    "mha.linear_g.weight": "gate",
    "mha.linear_g.bias": "gate_bias",
    "mha.linear_o.weight": "o",
    "mha.linear_o.bias": "o_bias",
    "linear_a_p.weight": "left",
    "linear_a_p.bias": "left_bias",
    "linear_a_g.weight": "left_gate",
    "linear_a_g.bias": "left_gate_bias",
    "linear_b_p.weight": "right",
    "linear_b_p.bias": "right_bias",
    "linear_b_g.weight": "right_gate",
    "linear_b_g.bias": "right_gate_bias",
    "linear_z.weight": "o",
    "linear_z.bias": "o_bias",
    "linear_g.weight": "gate",
    "linear_g.bias": "gate_bias",
}


def as_ours(name, x):
    """A parameter or its gradient in our layout."""
    x = x.numpy()
    ours = NAMES[name]
    if "norm" not in ours and x.ndim == 2:
        x = x.T
    if name.startswith("mha") and ours != "o_bias":
        if ours == "o":
            return x.reshape(HEADS, HEAD_DIM, -1)
        return x.reshape(*x.shape[:-1], HEADS, HEAD_DIM)
    return x


def of_module(module, mask):
    """Its parameters, input, cotangent, output and gradients."""
    for parameter in module.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape)
    pair = torch.randn(1, RESIDUES, RESIDUES, WIDTH, requires_grad=True)
    cotangent = torch.randn(pair.shape) * mask[..., None]
    output = module(pair, mask=mask)
    (output * cotangent).sum().backward()
    arrays = {"pair": pair.detach(), "mask": mask, "cotangent": cotangent}
    arrays |= {"output": output.detach(), "gradients/pair": pair.grad}
    arrays = {name: x.numpy() for name, x in arrays.items()}
    for name, parameter in module.named_parameters():
        arrays[f"params/{NAMES[name]}"] = as_ours(name, parameter.detach())
        arrays[f"gradients/params/{NAMES[name]}"] = as_ours(name, parameter.grad)
    return arrays


class Core(esmfold.EsmFoldAttention):
    """Their attention without projections and gate."""

    def _prep_qkv(self, q_x, kv_x):
        q, (k, v) = q_x, kv_x
        return q.transpose(-2, -3) * HEAD_DIM**-0.5, k.transpose(-2, -3), v.transpose(-2, -3)

    def _wrap_up(self, o, q_x):
        return o


def of_attention():
    """The operation alone: its output and the gradients of all five operands."""
    core = Core(1, 1, 1, HEAD_DIM, HEADS)
    sizes = {
        "q": (2, ROWS, RESIDUES, HEADS, HEAD_DIM),
        "k": (2, ROWS, KEYS, HEADS, HEAD_DIM),
        "v": (2, ROWS, KEYS, HEADS, HEAD_DIM),
        "mask_bias": (2, ROWS, 1, 1, KEYS),
        "pair_bias": (2, 1, HEADS, RESIDUES, KEYS),
    }
    operands = {name: torch.randn(size, requires_grad=True) for name, size in sizes.items()}
    q, k, v, mask_bias, pair_bias = operands.values()
    output = core(q, (k, v), biases=[mask_bias, pair_bias])
    cotangent = torch.randn(output.shape)
    (output * cotangent).sum().backward()
    arrays = {name: x.detach().numpy() for name, x in operands.items()}
    arrays |= {f"gradients/{name}": x.grad.numpy() for name, x in operands.items()}
    return arrays | {"output": output.detach().numpy(), "cotangent": cotangent.numpy()}


def main():
    """Each module's arrays under its name."""
    torch.manual_seed(0)
    mask = (torch.rand(1, RESIDUES, RESIDUES) < 0.7).float()
    mask[:, 2], mask[:, :, 4] = 0, 0
    shape = SimpleNamespace(pairwise_state_dim=WIDTH)
    found = {"attention": of_attention()}
    for name, is_first in (("starting", True), ("ending", False)):
        module = esmfold.EsmFoldTriangleAttention(WIDTH, HEAD_DIM, HEADS, starting=is_first)
        found[name] = of_module(module, mask)
    for name, is_first in (("outgoing", True), ("incoming", False)):
        module = esmfold.EsmFoldTriangleMultiplicativeUpdate(shape, _outgoing=is_first)
        found[name] = of_module(module, mask)
    arrays = {f"{name}/{key}": x for name, own in found.items() for key, x in own.items()}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
