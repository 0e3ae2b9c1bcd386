"""Loss and every gradient on a mesh equal the single device's, through remat, the stack, MoE and a Pallas call."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxscale import tree
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.attention import attention
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import DATA, MeshConfig, make_mesh
from jaxscale.parallel.pipeline.schedule import make_schedule
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import all_axes_of, make_specs
from jaxscale.parallel.sequence.ring import ring_attention
from jaxscale.train.losses import NextTokenLoss

DENSE = ModelConfig(
    vocab_size=64,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=16,
    use_qk_norm=True,
    use_bias=True,
    norm="layernorm",
)
MOE = ModelConfig(
    vocab_size=64,
    num_layers=4,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=16,
    moe_pattern=(False, True),
    windows=(None, 5),
    num_experts=4,
    num_active_experts=2,
    expert_dim=32,
    router_z_loss=1e-3,
    is_tied=True,
)


KEY = jax.random.key(1)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@jax.custom_vjp
def doubled(x):
    """2 x by an interpreted Pallas kernel, in the forward and in the backward."""

    def kernel(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(
        x
    )


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (doubled(g),))


def pallas_attention(q, k, v, context, cache):
    """Reference attention of 2 q / 2: a kernel call on local shapes inside the layer."""
    return attention(doubled(q) / 2, k, v, context, cache, implementation="reference")


def make_batch(rows=8, length=16, seed=0, empty=None):
    """Packed documents, padding, and rows 3 and 7, micro-batch 3 of 4, whose labels count for nothing.

    Args:
        empty: rows and columns, as ranges, all of whose tokens are padding.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (rows, length + 1))
    segments = np.repeat([[1] * 6 + [2] * 7 + [0] * (length - 13)], rows, 0)
    if empty is not None:
        segments[np.ix_(*empty)] = 0
    positions = np.concatenate([np.arange(6), np.arange(7), np.arange(length - 13)])[None].repeat(
        rows, 0
    )
    weights = (segments > 0) * 1.0
    weights[3::4] = 0
    weights[0, 2:] = 0
    return dict(
        tokens=jnp.asarray(tokens[:, :-1]),
        labels=jnp.asarray(tokens[:, 1:]),
        weights=jnp.asarray(weights),
        segments=jnp.asarray(segments),
        positions=jnp.asarray(positions),
    )


def make_loss(model, dtype="float64", **stack):
    """With noise on the embeddings too if the model has dropout."""
    policy, noise = Policy(dtype, dtype, dtype, dtype), 0.2 * (model.expert_dropout > 0)
    return NextTokenLoss(
        model, policy, StackConfig(num_loss_chunks=2, **stack), z_loss=1e-3, embedding_noise=noise
    )


@functools.cache
def make_params(model):
    """No leaf at a value that would hide it: norm scales are not 1 and biases not 0."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.asarray(rng.normal(path[-1].key == "scale", 0.1, p.shape)),
        abstract_params(model, "float64"),
    )


@functools.cache
def on_one_device(model):
    """Of a batch, whose contents share the compilation."""
    return jax.jit(
        jax.value_and_grad(lambda params, batch: make_loss(model)(params, batch, None)[0])
    )


@functools.cache
def single_device(model, num_microbatches=1, empty=None):
    """Loss and gradients of the micro-batches one by one, with the plain operations, added up."""
    with jax.enable_x64(True):
        run = on_one_device(model)
        whole = with_token_keys(make_batch(empty=empty), KEY)
        parts = [
            run(make_params(model), jax.tree.map(lambda a: a[m::num_microbatches], whole))  # noqa: B023
            for m in range(num_microbatches)
        ]
        return jax.tree.map(lambda *leaves: sum(leaves), *parts)


def on_mesh(
    model,
    *,
    num_microbatches=1,
    trainable=".*",
    remat="full",
    is_scanned=True,
    dtype="float64",
    empty=None,
    **sizes,
):
    """Sums and gradients on a mesh, the gradients of layer stacks in canonical order."""
    config = MeshConfig(**sizes)
    mesh = make_mesh(config, jax.devices()[: math.prod(config.sizes)])
    specs = make_specs(parameter_table(model), config)
    attend = pallas_attention
    if config.ring > 1:
        attend = ring_attention(
            ring=config.ring,
            num_ulysses=config.sequence // config.ring,
            uses_permute=config.pipeline == 1,
        )
    operations = make_operations(config, specs, attention=attend, reduction=dtype)
    schedule = None
    if config.pipeline > 1:
        schedule = make_schedule(
            config.schedule, config.pipeline, config.num_chunks, num_microbatches
        )
    region = Region(
        mesh,
        specs,
        operations,
        num_microbatches=num_microbatches,
        schedule=schedule,
        ring=config.ring,
        reduction=dtype,
        trainable=trainable,
    )
    loss = make_loss(model, dtype, remat=remat, is_scanned=is_scanned)
    params = specs.layout.store(
        jax.tree.map(lambda p: p.astype(dtype), make_params(model)), specs.dims
    )
    sums, gradients = jax.jit(region.gradient(loss))(params, make_batch(empty=empty), KEY)
    dims = jax.tree.map(
        lambda d, g: d if g is not None else None,
        specs.dims,
        gradients,
        is_leaf=lambda x: x is None,
    )
    return sums, specs.layout.restore(gradients, dims)


def assert_equal_to_single_device(result, wanted, empty=None):
    (loss, weight, metrics), gradients = result
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-12)
    valid = make_batch(empty=empty)["weights"].sum()
    assert weight == valid
    if "load" in metrics:
        np.testing.assert_array_equal(metrics["load"].sum(1), MOE.num_active_experts * valid)
    for (path, got), want in zip(
        tree.flatten(gradients).items(), jax.tree.leaves(wanted[1]), strict=True
    ):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 1e-11, f"{path}: {error}"


def test_data_expert_tensor_equal_one_device():
    assert_equal_to_single_device(
        on_mesh(DENSE, data=2, expert=2, tensor=2, zero=3), single_device(DENSE)
    )


def test_microbatches_equal_one_batch():
    """Of unequal numbers of valid tokens, one of them zero; and each device holds its share of the gradients."""
    result = on_mesh(DENSE, num_microbatches=4, data=2, zero=2)
    assert_equal_to_single_device(result, single_device(DENSE))
    specs = make_specs(parameter_table(DENSE), MeshConfig(data=2, zero=2)).gradients
    for (path, leaf), spec in zip(
        tree.flatten(result[1]).items(), jax.tree.leaves(specs), strict=True
    ):
        assert leaf.addressable_shards[0].data.size == leaf.size // (
            2 if DATA in all_axes_of(spec) else 1
        ), path


EVERY_ROW, EVERY_TOKEN, SECOND_ROWS = range(8), range(16), range(4, 8)


@pytest.mark.parametrize(
    "model, sizes, empty",
    [
        (DENSE, dict(data=2), (SECOND_ROWS, EVERY_TOKEN)),
        (
            DENSE,
            dict(pipeline=2, num_microbatches=4),
            (range(2, 8, 4), EVERY_TOKEN),
        ),  # beside micro-batch 3
        (DENSE, dict(sequence=2), (EVERY_ROW, range(8, 16))),
        (
            DENSE,
            dict(sequence=2, ring=2),
            (EVERY_ROW, range(4, 12)),
        ),  # the second member has the middle
        (MOE, dict(expert=2), (SECOND_ROWS, EVERY_TOKEN)),
        (
            MOE,
            dict(tensor=2),
            (SECOND_ROWS, EVERY_TOKEN),
        ),  # whose norms and losses have a share of the rows
    ],
    ids=["data", "pipeline", "ulysses", "ring", "expert", "tensor"],
)
def test_a_member_or_micro_batch_all_of_whose_tokens_are_padding_counts_for_nothing(
    model, sizes, empty
):
    """Divided where the tokens are, its loss would be 0 / 0, or a mean of means."""
    result, wanted = (
        on_mesh(model, empty=empty, remat="none", **sizes),
        single_device(model, 1, empty),
    )
    assert_equal_to_single_device(result, wanted, empty)


def test_frozen_parameters_have_no_gradient():
    _, gradients = on_mesh(DENSE, trainable=".*attention/[qk]", data=2, zero=3)
    _, wanted = single_device(DENSE)
    attention = gradients["layers"]["0"].pop("attention")
    for name in "qk":
        np.testing.assert_allclose(
            attention.pop(name), wanted["layers"]["0"]["attention"][name], rtol=1e-9, atol=1e-14
        )
    assert jax.tree.leaves((gradients, attention)) == []
    assert set(gradients) == set(wanted)
