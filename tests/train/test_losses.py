"""What the loss reports beside the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import init_params
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.operations import Operations
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.losses import NextTokenLoss
from jaxscale.train.plan import TrainConfig, make_plan
from tests.train.conftest import DATA, MODEL, OPTIMIZER


def test_noise_on_embeddings_is_uniform_as_wide_as_asked_and_of_training_only():
    """And the run's alpha is divided by sqrt(T D), as NEFTune says."""
    model = dataclasses.replace(MODEL, max_length=64)
    loss = make_plan(
        model=model,
        mesh=MeshConfig(),
        data=dataclasses.replace(DATA, sequence_length=64),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=1, embedding_noise=5.0),
        policy=Policy(compute="float32"),
        stack=StackConfig(),
        devices=jax.devices()[:1],
    ).loss_fn
    width = 5 / np.sqrt(64 * 16)
    tokens = jnp.zeros((8, 64), jnp.int32)
    batch = dict(
        tokens=tokens, weights=jnp.ones((8, 64)), positions=jnp.tile(jnp.arange(64), (8, 1))
    )
    params = init_params(model, jax.random.key(0), "float32")
    plain = loss.start(params, batch, operations=Operations())
    noise = (
        loss.start(params, with_token_keys(batch, jax.random.key(1)), operations=Operations())
        - plain
    )
    np.testing.assert_array_equal(
        plain, jnp.broadcast_to(params["embedding"]["tokens"][0], plain.shape)
    )
    np.testing.assert_allclose(
        np.histogram(noise, 4, (-width, width))[0] / noise.size, 0.25, atol=0.02
    )


def test_the_load_has_a_row_for_each_layer_in_order():
    """Every token of layer l chooses expert choices[l]: norms without scale make each token the same vector."""
    choices = (2, 0, 3, 1)
    model = ModelConfig(
        vocab_size=32,
        num_layers=4,
        model_dim=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        ffn_dim=8,
        max_length=8,
        norm="layernorm",
        use_bias=True,
        windows=(None, 4),
        moe_pattern=(True,),
        num_experts=4,
        num_active_experts=1,
        expert_dim=8,
    )
    params = init_params(model, jax.random.key(0), "float32")
    for position in (0, 1):
        moe = params["layers"][str(position)]["moe"]
        moe["norm"] = {"scale": jnp.zeros((2, 8)), "bias": jnp.ones((2, 8))}
        moe["router"] = jnp.stack(
            [jnp.tile(jax.nn.one_hot(choices[2 * n + position], 4), (8, 1)) for n in (0, 1)]
        )
    tokens = jnp.arange(16).reshape(2, 8)
    batch = dict(
        tokens=tokens,
        labels=tokens,
        weights=jnp.ones((2, 8)),
        positions=jnp.tile(jnp.arange(8), (2, 1)),
    )
    loss = NextTokenLoss(model, Policy(compute="float32"), StackConfig(num_loss_chunks=1))
    _, _, metrics = jax.jit(loss)(params, batch, None)
    np.testing.assert_array_equal(metrics["load"], 16 * np.eye(4)[list(choices)])
