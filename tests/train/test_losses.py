"""What the loss reports beside the loss."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import init_params
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.precision import Policy
from jaxscale.train.losses import NextTokenLoss


def test_the_load_has_a_row_for_each_layer_in_order():
    """Every token of layer l chooses expert choices[l]: norms without scale make each token the same vector."""
    choices = (2, 0, 3, 1)
    model = ModelConfig(
        vocab_size=32, num_layers=4, model_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=8, max_length=8,
        norm="layernorm", use_bias=True, windows=(None, 4), moe_pattern=(True,), num_experts=4, num_active_experts=1,
        expert_dim=8,
    )  # fmt: skip
    params = init_params(model, jax.random.key(0), "float32")
    for position in (0, 1):
        moe = params["layers"][str(position)]["moe"]
        moe["norm"] = {"scale": jnp.zeros((2, 8)), "bias": jnp.ones((2, 8))}
        moe["router"] = jnp.stack([jnp.tile(jax.nn.one_hot(choices[2 * n + position], 4), (8, 1)) for n in (0, 1)])
    tokens = jnp.arange(16).reshape(2, 8)
    batch = dict(tokens=tokens, labels=tokens, weights=jnp.ones((2, 8)), positions=jnp.tile(jnp.arange(8), (2, 1)))
    loss = NextTokenLoss(model, Policy(compute="float32"), StackConfig(num_loss_chunks=1))
    _, _, metrics = jax.jit(loss)(params, batch, None)
    np.testing.assert_array_equal(metrics["load"], 16 * np.eye(4)[list(choices)])
