"""Losses that are not ours: an MLP, a small ResNet and random graphs in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.planner.atomic import make_components
from jaxscale.planner.cluster import DEVICES
from jaxscale.planner.costs import ModelledCosts
from jaxscale.planner.trace import trace


def mlp(num_layers=4, width=8, rows=8, seed=0):
    """(loss, params, batch) of an MLP with a shared first and last matrix."""
    rng = np.random.default_rng(seed)

    def matrix():
        return jnp.asarray(rng.normal(size=(width, width)) / np.sqrt(width), jnp.float32)

    params = {
        "layers": [{"w": matrix(), "b": jnp.zeros(width)} for _ in range(num_layers)],
        "shared": matrix(),
    }
    batch = {
        "x": jnp.asarray(rng.normal(size=(rows, width)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(rows, width)), jnp.float32),
    }

    def loss(params, batch):
        x = batch["x"] @ params["shared"]
        for layer in params["layers"]:
            x = x + jax.nn.gelu(x @ layer["w"] + layer["b"])
        y = x @ params["shared"].T
        return jnp.mean((y - batch["y"]) ** 2)

    return loss, params, batch


def resnet(num_blocks=3, channels=4, rows=8, size=6, num_classes=5, seed=1):
    """(loss, params, batch) of convolutions with skip connections over two widths."""
    rng = np.random.default_rng(seed)

    def kernel(k, n_in, n_out):
        scale = 1 / np.sqrt(k * k * n_in)
        return jnp.asarray(rng.normal(size=(k, k, n_in, n_out)) * scale, jnp.float32)

    params = {
        "stem": kernel(3, 3, channels),
        "blocks": [
            {
                "first": kernel(3, channels, channels),
                "second": kernel(3, channels, channels),
                "scale": jnp.ones(channels),
            }
            for _ in range(num_blocks)
        ],
        "head": jnp.asarray(rng.normal(size=(channels, num_classes)), jnp.float32),
    }
    batch = {
        "images": jnp.asarray(rng.normal(size=(rows, size, size, 3)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, num_classes, rows), jnp.int32),
    }

    def conv(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def loss(params, batch):
        x = conv(batch["images"], params["stem"])
        for block in params["blocks"]:
            y = jax.nn.relu(conv(x, block["first"])) * block["scale"]
            x = jax.nn.relu(x + conv(y, block["second"]))
        logits = x.mean((1, 2)) @ params["head"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], 1)
        return -jnp.mean(picked)

    return loss, params, batch


def random_loss(seed, num_values=14):
    """A random directed graph of sums and products."""
    rng = np.random.default_rng(seed)
    choices = [
        (rng.integers(0, i + 1), rng.integers(0, i + 1), rng.integers(0, 3))
        for i in range(num_values)
    ]

    def loss(params, batch):
        values = [batch["x"]]
        for first, second, kind in choices:
            a, b = values[first], values[second]
            values.append((a + b, a * jnp.cos(b), a @ params)[kind])
        return sum(value.sum() for value in values)

    return loss, jnp.eye(3), {"x": jnp.ones((4, 3))}


def costs_of(case):
    return ModelledCosts(make_components(trace(*case)), DEVICES["h200"])
