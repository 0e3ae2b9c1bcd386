"""What the loss reports beside the loss."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.checkpoint.manager import CheckpointConfig
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.ops.backends import Operations
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.run.run import Run
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig


def test_noise_on_embeddings_is_uniform_as_wide_as_asked_and_of_training_only():
    """And the run's alpha is divided by sqrt(T D), as NEFTune says."""
    model = from_flat(
        vocab_size=32,
        num_layers=2,
        model_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=32,
        max_length=64,
    )
    source = TextSource(("unread",))
    run = Run(
        directory="unused",
        model=model,
        mesh=MeshConfig(),
        data=DataConfig(sources=(source,), sequence_length=64, batch_size=8),
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=1, embedding_noise=5.0),
        checkpoint=CheckpointConfig(directory="unused", save_every=1, keep_last=1),
        policy=Policy(compute="float32"),
    )
    loss = run.loss(run)
    width = 5 / np.sqrt(64 * 16)
    tokens = jnp.zeros((8, 64), jnp.int32)
    batch = dict(
        tokens=tokens, weights=jnp.ones((8, 64)), positions=jnp.tile(jnp.arange(64), (8, 1))
    )
    params = init_params(parameter_table(model), jax.random.key(0), "float32")
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
    """Every token of layer l chooses expert choices[l]: norms without scale make tokens alike."""
    choices = (2, 0, 3, 1)
    model = from_flat(
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
    params = init_params(parameter_table(model), jax.random.key(0), "float32")
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
    loss = NextTokenLoss(model, Policy(compute="float32"), ExecutionConfig(num_loss_chunks=1))
    _, _, metrics = jax.jit(loss)(params, batch, None)
    np.testing.assert_array_equal(metrics["load"], 16 * np.eye(4)[list(choices)])
