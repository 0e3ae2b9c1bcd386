"""Write the tests' fixture of a block: AlphaFold 2's own code on tiny widths, with gradients.

Needs alphafold-colabfold, dm-haiku, dm-tree and ml-collections from PyPI beside jax; the tests need
none. Its triangle multiplication along incoming edges calls left what the paper, and ours, call b.

python experiments/evoformer/alphafold_fixture.py
"""

from pathlib import Path

import haiku as hk
import jax
import numpy as np
from alphafold.model import config, modules, prng

FILE = Path(__file__).resolve().parents[2] / "tests/models/evoformer/fixtures/alphafold.npz"
SEQUENCES, RESIDUES, MSA_DIM, PAIR_DIM = 5, 7, 12, 8
NORM = {"scale": "norm/scale", "offset": "norm/bias"}
ATTENTION = {
    "query_norm": NORM,
    "feat_2d_norm": {"scale": "pair_norm/scale", "offset": "pair_norm/bias"},
    "": {"feat_2d_weights": "pair_bias"},
    "attention": {
        "query_w": "q",
        "key_w": "k",
        "value_w": "v",
        "gating_w": "gate",
        "gating_b": "gate_bias",
        "output_w": "o",
        "output_b": "o_bias",
    },
}
TRANSITION = {
    "input_layer_norm": NORM,
    "transition1": {"weights": "up", "bias": "up_bias"},
    "transition2": {"weights": "down", "bias": "down_bias"},
}
OUTER = {
    "layer_norm_input": NORM,
    "left_projection": {"weights": "left", "bias": "left_bias"},
    "right_projection": {"weights": "right", "bias": "right_bias"},
    "": {"output_w": "o", "output_b": "o_bias"},
}


def multiplication(left, right):
    """Names of a triangle multiplication, whose sides may be called by each other's."""
    return {
        "layer_norm_input": NORM,
        "left_projection": {"weights": left, "bias": f"{left}_bias"},
        "right_projection": {"weights": right, "bias": f"{right}_bias"},
        "left_gate": {"weights": f"{left}_gate", "bias": f"{left}_gate_bias"},
        "right_gate": {"weights": f"{right}_gate", "bias": f"{right}_gate_bias"},
        "center_layer_norm": {"scale": "product_norm/scale", "offset": "product_norm/bias"},
        "output_projection": {"weights": "o", "bias": "o_bias"},
        "gating_linear": {"weights": "gate", "bias": "gate_bias"},
    }


PARTS = {  # of theirs, ours
    "msa_row_attention_with_pair_bias": ("msa_row_attention", ATTENTION),
    "msa_column_attention": ("msa_column_attention", ATTENTION),
    "msa_transition": ("msa_transition", TRANSITION),
    "outer_product_mean": ("outer_product_mean", OUTER),
    "triangle_multiplication_outgoing": (
        "triangle_multiplication_outgoing",
        multiplication("left", "right"),
    ),
    "triangle_multiplication_incoming": (
        "triangle_multiplication_incoming",
        multiplication("right", "left"),
    ),
    "triangle_attention_starting_node": ("triangle_attention_starting", ATTENTION),
    "triangle_attention_ending_node": ("triangle_attention_ending", ATTENTION),
    "pair_transition": ("pair_transition", TRANSITION),
}


def block(msa, pair, msa_mask, pair_mask):
    """Their block, on small heads and without dropout."""
    model = config.model_config("model_1").model
    parts = model.embeddings_and_evoformer.evoformer
    with parts.unlocked():
        parts.msa_row_attention_with_pair_bias.num_head = 3
        parts.msa_column_attention.num_head = 3
        parts.triangle_attention_starting_node.num_head = 2
        parts.triangle_attention_ending_node.num_head = 2
        parts.outer_product_mean.num_outer_channel = 4
        for edges in ("outgoing", "incoming"):
            own = parts[f"triangle_multiplication_{edges}"]
            own.num_intermediate_channel, own.fuse_projection_weights = 6, False
        model.global_config.deterministic = True
    iteration = modules.EvoformerIteration(parts, model.global_config, False, "block")
    activations, masks = {"msa": msa, "pair": pair}, {"msa": msa_mask, "pair": pair_mask}
    key = prng.SafeKey(jax.random.key(0))
    return iteration(activations, masks, is_training=False, safe_key=key)


def ours(tree):
    """Their parameters, or gradients of these, by our paths."""
    found = {}
    for module, leaves in tree.items():
        part, _, within = module.removeprefix("block/").partition("/")
        name, known = PARTS[part]
        within = within.removeprefix("~/")
        found |= {f"{name}/{known[within][leaf]}": x for leaf, x in leaves.items()}
    return found


def main():
    """The last residue and one sequence are masked, and some more of the alignment."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype("float32")  # noqa: E731
    msa = draw(SEQUENCES, RESIDUES, MSA_DIM)
    pair = draw(RESIDUES, RESIDUES, PAIR_DIM)
    msa_mask = (rng.random((SEQUENCES, RESIDUES)) < 0.8).astype("float32")
    msa_mask[0, :-1], msa_mask[2], msa_mask[:, -1] = 1, 0, 0
    residues = (np.arange(RESIDUES) < RESIDUES - 1).astype("float32")
    pair_mask = residues[:, None] * residues
    cotangents = {
        "msa": draw(*msa.shape) * msa_mask[..., None],
        "pair": draw(*pair.shape) * pair_mask[..., None],
    }
    transformed = hk.without_apply_rng(hk.transform(block))
    first = transformed.init(jax.random.key(0), msa, pair, msa_mask, pair_mask)
    params = jax.tree.map(lambda x: 0.5 * draw(*x.shape), first)

    def apply(params, msa, pair):
        return transformed.apply(params, msa, pair, msa_mask, pair_mask)

    with jax.default_matmul_precision("highest"):
        output, pullback = jax.vjp(apply, params, msa, pair)
        dparams, dmsa, dpair = pullback(cotangents)
    arrays = {"msa": msa, "pair": pair, "msa_mask": msa_mask, "pair_mask": pair_mask}
    arrays |= {f"cotangents/{name}": x for name, x in cotangents.items()}
    arrays |= {f"output/{name}": x for name, x in output.items()}
    arrays |= {"gradients/msa": dmsa, "gradients/pair": dpair}
    arrays |= {f"params/{path}": x for path, x in ours(params).items()}
    arrays |= {f"gradients/params/{path}": x for path, x in ours(dparams).items()}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
