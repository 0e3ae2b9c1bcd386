"""Rotary positions and routers equal those of released code, which shares nothing with ours.

experiments/huggingface_fixtures.py and sparsemixer_fixture.py have made the files in fixtures/;
tests/convert holds whole models against Hugging Face's.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import (
    ExpertsConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RotaryConfig,
    SparseMixerRouter,
    YarnScaling,
)
from jaxscale.models.sparsemixer import sparsemixer
from jaxscale.ops.draws import Draws

FIXTURES = Path(__file__).parent / "fixtures"
ROTARY = {
    "llama31": RotaryConfig(5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "llama32": RotaryConfig(5e5, scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192)),
    "linear": RotaryConfig(1e4, scaling=LinearScaling(4.0)),
    "yarn": RotaryConfig(1e6, scaling=YarnScaling(4.0, 32768)),
    "yarn_given": RotaryConfig(
        1e4, scaling=YarnScaling(16.0, 4096, beta_fast=24.0, beta_slow=2.0, attention_factor=1.3)
    ),
    "longrope": RotaryConfig(
        1e4,
        scaling=LongRopeScaling(
            (1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0),
            magnitude=math.sqrt(1 + math.log(4) / math.log(64)),
        ),
    ),
}


@pytest.mark.parametrize("name", ROTARY)
def test_frequencies_equal(name):
    """Of heads as large as those of released models; Hugging Face's are float32."""
    case = json.loads((FIXTURES / "rotary.json").read_text())[name]
    with np.load(FIXTURES / "rotary.npz") as file:
        *wanted, magnitude = file[name]
    config = ROTARY[name]
    np.testing.assert_allclose(config.frequencies(case["head_dim"]), wanted, rtol=2e-6)
    assert config.scaling.magnitude == pytest.approx(magnitude, rel=1e-6)


def test_sparsemixer_v2_draws_and_differentiates_as_its_released_code():
    """Given the same random numbers: the experts, their multipliers and the logits' gradient."""
    with np.load(FIXTURES / "sparsemixer.npz") as file:
        wanted = dict(file)
    threshold = float(wanted["threshold"])
    router = SparseMixerRouter(threshold, mask="released", expert_gradient="released")
    config = ExpertsConfig(num_experts=16, dim=48, router=router)
    draws = Draws(jnp.asarray(wanted["keys"])[None])
    with jax.enable_x64(True):
        cotangent = jnp.asarray(wanted["cotangent"])

        @jax.jit
        @jax.grad
        def gradient(z):
            return (sparsemixer(z, draws, config).gates[0] * cotangent).sum()

        z = jnp.asarray(wanted["z"])[None]
        ours = jax.jit(lambda z: sparsemixer(z, draws, config))(z)
        np.testing.assert_array_equal(ours.index[0], wanted["index"])
        # It has 0.3333 for a third.
        np.testing.assert_allclose(ours.gates[0], wanted["gates"], rtol=2e-4)
        np.testing.assert_allclose(gradient(z)[0], wanted["gradient"], atol=1e-12)
    assert (np.asarray(ours.gates) < 0.99).mean() > 0.1
    assert len({*map(tuple, wanted["index"].tolist())}) > 90
