"""Write tests/models/fixtures/sparsemixer.npz: what SparseMixer-v2's released code draws.

Its code in transformers' PhiMoE is given the random numbers that ours draws. Needs torch.

python experiments/sparsemixer_fixture.py
"""

from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from jaxscale.models.config import ExpertsConfig, SparseMixerRouter
from jaxscale.models.sparsemixer import random_numbers
from jaxscale.ops.draws import Draws

FILE = Path(__file__).resolve().parents[1] / "tests" / "models" / "fixtures" / "sparsemixer.npz"
NUM_TOKENS, NUM_EXPERTS, THRESHOLD = 256, 16, 0.3


def main():
    """Logits, the two experts of each token, their multipliers and the gradient of the logits."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(NUM_TOKENS, NUM_EXPERTS))
    cotangent = rng.normal(size=(NUM_TOKENS, 2))
    keys = rng.integers(0, 2**32, (NUM_TOKENS, 2)).astype("uint32")
    router = SparseMixerRouter(THRESHOLD, mask="released", expert_gradient="released")
    config = ExpertsConfig(num_experts=NUM_EXPERTS, dim=48, router=router)
    drawn = random_numbers(Draws(jnp.asarray(keys)[None]), config)[0]
    numbers = torch.from_numpy(np.array(drawn, np.float64))
    # It draws an expert by exponential numbers, and c = 1 where a uniform one is large enough.
    exponentials = iter([-numbers[:, draw, :-1].log() for draw in range(2)])
    uniforms = iter([1 - numbers[:, draw, -1:] for draw in range(2)])
    scores = torch.from_numpy(z).requires_grad_()
    with (
        mock.patch.object(torch.Tensor, "exponential_", lambda self: next(exponentials)),
        mock.patch.object(torch, "rand_like", lambda like: next(uniforms)),
        mock.patch.object(torch.Tensor, "uniform_", lambda self: self),
    ):
        gates, index = sparsemixer(scores, THRESHOLD, training=True)
    (gates * torch.from_numpy(cotangent)).sum().backward()
    np.savez_compressed(
        FILE,
        z=z,
        cotangent=cotangent,
        keys=keys,
        threshold=THRESHOLD,
        index=index.numpy(),
        gates=gates.detach().numpy(),
        gradient=scores.grad.numpy(),
    )


if __name__ == "__main__":
    main()
