"""Loss and every gradient on a mesh equal the single device's, through remat, the stack, MoE and a Pallas call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.attention import attention
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.train.losses import NextTokenLoss

DENSE = ModelConfig(
    vocab_size=64, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=32, max_length=16,
    use_qk_norm=True, use_bias=True, norm="layernorm",
)  # fmt: skip
MOE = ModelConfig(
    vocab_size=64, num_layers=4, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=32, max_length=16,
    moe_pattern=(False, True), windows=(None, 5), num_experts=4, num_active_experts=2, expert_dim=32,
    router_z_loss=1e-3, is_tied=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@jax.custom_vjp
def doubled(x):
    """2 x by an interpreted Pallas kernel, in the forward and in the backward."""

    def kernel(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (doubled(g),))


def pallas_attention(q, k, v, context, cache):
    """Reference attention of 2 q / 2: a kernel call on local shapes inside the layer."""
    return attention(doubled(q) / 2, k, v, context, cache, implementation="reference")


def make_batch(rows=8, length=16, seed=0):
    """Packed documents, padding, and one row whose labels count for nothing."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (rows, length + 1))
    segments = np.repeat([[1] * 6 + [2] * 7 + [0] * (length - 13)], rows, 0)
    positions = np.concatenate([np.arange(6), np.arange(7), np.arange(length - 13)])[None].repeat(rows, 0)
    weights = (segments > 0) * 1.0
    weights[rows - 1] = 0
    return dict(
        tokens=jnp.asarray(tokens[:, :-1]), labels=jnp.asarray(tokens[:, 1:]), weights=jnp.asarray(weights),
        segments=jnp.asarray(segments), positions=jnp.asarray(positions),
    )  # fmt: skip


def make_loss(model, **stack):
    policy = Policy("float64", "float64", "float64", "float64")
    return NextTokenLoss(model, policy, StackConfig(num_loss_chunks=2, **stack), z_loss=1e-3)


@functools.cache
def single_device(model):
    with jax.enable_x64(True):
        params = init_params(model, jax.random.key(0), "float64")
        loss = make_loss(model)
        value, gradients = jax.jit(jax.value_and_grad(lambda p: loss(p, make_batch(), None)[0]))(params)
    return params, value, gradients


def on_mesh(model, config, *, num_microbatches=1, **stack):
    mesh = make_mesh(config)
    specs = make_specs(parameter_table(model), config)
    operations = make_operations(config, specs, attention=pallas_attention, reduction="float64")
    region = Region(mesh, specs, operations, num_microbatches, reduction="float64")
    params = single_device(model)[0]
    return jax.jit(region.gradient(make_loss(model, **stack)))(params, make_batch(), jax.random.key(1))


def assert_equal_to_single_device(model, result):
    _, loss, gradients = single_device(model)
    (mesh_loss, weight, _), mesh_gradients = result
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-12)
    assert weight == make_batch()["weights"].sum()
    for path, wanted in jax.tree_util.tree_leaves_with_path(gradients):
        got = functools.reduce(lambda t, key: t[key.key], path, mesh_gradients)
        error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert error < 1e-11, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_data_expert_tensor_equal_one_device(model, zero):
    config = MeshConfig(data=2, expert=2, tensor=2, zero=zero)
    assert_equal_to_single_device(model, on_mesh(model, config, is_scanned=zero == 0, remat="full"))
