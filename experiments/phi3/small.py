"""What both studies share: small models of bytes on the interpreter's standard library."""

import functools
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.ops.rotary import RotaryConfig
from jaxscale.train.optim import OptimizerConfig, make_optimizer

BYTES = 256


def read_text():
    """(training text, held-out text): the bytes of every file, of every twentieth held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
    held_out = np.concatenate(texts[::20])
    return np.concatenate([text for i, text in enumerate(texts) if i % 20]), held_out


def draw_rows(text, num_rows, length, seed):
    """Rows [num_rows, length + 1] from random places of a text."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length - 1, num_rows)
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def make_model(dim, *, head_dim, rotary=RotaryConfig(), **more):
    """Four layers with heads of `head_dim`."""
    num_heads = dim // head_dim
    layer = LayerConfig(
        AttentionConfig(num_heads, num_heads, head_dim, rotary=rotary),
        FeedForwardConfig(4 * dim, "gelu"),
    )
    return ModelConfig(BYTES, 4, dim, 1 << 20, (layer,), **more)


def losses(model, params, rows):
    """Nats of each byte after the first, [rows, length]."""
    decoder = Decoder(model, policy=Policy(compute="float32"), execution=EXECUTION)
    tokens = rows[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, _ = decoder.logits(params, {"tokens": tokens, "positions": positions})
    chosen = jnp.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen


EXECUTION = ExecutionConfig(remat="none", is_scanned=True, attention="reference")


@functools.partial(jax.jit, static_argnums=0)
def train(model, params, rows, learning_rate):
    """(params, losses [steps]) after a step on each batch of rows [steps, B, length + 1]."""
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.0, warmup_steps=len(rows) // 10)
    optimizer = make_optimizer(config, steps=len(rows), table=parameter_table(model))

    def step(carry, batch):
        params, state = carry
        loss, gradients = jax.value_and_grad(lambda params: losses(model, params, batch).mean())(
            params
        )
        updates, state = optimizer.update(gradients, state, params)
        # AdamW's updates are proportional to the rate, so that it need not be compiled in.
        params = jax.tree.map(lambda p, u: p + learning_rate * u, params, updates)
        return (params, state), loss

    (params, _), history = lax.scan(step, (params, optimizer.init(params)), rows)
    return params, history
