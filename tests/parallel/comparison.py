"""Small models on one device and on a mesh: loss and every gradient, for the tests to compare."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
from jax.experimental import pallas as pl

from jaxscale import tree
from jaxscale.models.config import ModelConfig
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.attention import attention
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.pipeline.schedule import make_schedule
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import Specs, make_specs
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.layout import Chunked, Contiguous, Zigzag
from jaxscale.parallel.sequence.ring import ring_attention

SIZES = dict(
    vocab_size=64,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=16,
)
# By length of a row, the tokens of its documents; rows take them in turn. What is left is padding.
DOCUMENTS = {
    16: ((6, 7),),
    32: ((3, 17, 9), (32,), (13, 2, 1, 12), (30, 1)),
}
NUM_ACTIVE = 2  # experts of a mixture that a token visits
KEY = jax.random.key(1)
NUM_PROGRAMS = 8  # that are kept: the long tests would fill the memory with all of theirs


def dense(**changes) -> ModelConfig:
    """A dense model with every kind of bias and norm; arguments as `from_flat`."""
    fields = dict(num_layers=2, use_qk_norm=True, use_bias=True, norm="layernorm")
    return from_flat(**SIZES | fields | changes)


def mixture(**changes) -> ModelConfig:
    """Every other layer has experts and a window; arguments as `from_flat`."""
    fields = dict(
        num_layers=4,
        moe_pattern=(False, True),
        windows=(None, 5),
        num_experts=4,
        num_active_experts=NUM_ACTIVE,
        expert_dim=32,
        router_z_loss=1e-3,
        is_tied=True,
    )
    return from_flat(**SIZES | fields | changes)


DENSE = dense()
MOE = mixture()


@jax.custom_vjp
def doubled(x):
    """2 x by an interpreted Pallas kernel, in the forward and in the backward."""

    def kernel(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (doubled(g),))


def pallas_attention(q, k, v, context, cache):
    """Reference attention of 2 q / 2: a kernel call on local shapes inside the layer."""
    return attention(doubled(q) / 2, k, v, context, cache, implementation="reference")


def make_batch(rows=8, length=16, seed=0, empty=None):
    """Packed documents with padding; the labels of rows 3 and 7, micro-batch 3 of 4, do not count.

    Args:
        rows, length: B and T, of `DOCUMENTS`.
        seed: of the tokens.
        empty: rows and columns, as ranges, all of whose tokens are padding.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (rows, length + 1))
    documents = itertools.islice(itertools.cycle(DOCUMENTS[length]), rows)
    segments, positions = zip(*(_packed(sizes, length) for sizes in documents), strict=True)
    segments = np.array(segments)
    if empty is not None:
        segments[np.ix_(*empty)] = 0
    weights = (segments > 0) * 1.0
    weights[3::4] = 0
    weights[0, 2:] = 0
    return dict(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        weights=weights,
        segments=segments,
        positions=np.array(positions),
    )


def _packed(sizes, length):
    """(segments, positions) of a row of documents of so many tokens each, then padding."""
    sizes = *sizes, length - sum(sizes)
    numbers = *range(1, len(sizes)), 0
    return np.repeat(numbers, sizes), np.concatenate(list(map(np.arange, sizes)))


def has_dropout(model: ModelConfig) -> bool:
    """Whether an expert drops elements in training."""
    return any(layer.is_moe and layer.feed_forward.dropout > 0 for layer in model.pattern)


def make_loss(model, dtype="float64", **execution):
    """The loss of pretraining; a model with dropout also has noise on its embeddings."""
    return NextTokenLoss(
        model,
        Policy(dtype, dtype, dtype, dtype),
        ExecutionConfig(num_loss_chunks=2, **execution),
        z_loss=1e-3,
        embedding_noise=0.2 if has_dropout(model) else 0.0,
    )


@functools.cache
def make_params(model):
    """No leaf at a value that would hide it: norm scales are not 1 and biases not 0.

    In numpy: JAX compiles a program for each shape of its own arrays that a mesh shards.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.1, leaf.shape)

    shapes = abstract_params(parameter_table(model), "float64")
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.lru_cache(maxsize=NUM_PROGRAMS)
def on_one_device(model):
    """The compiled loss and gradient of a batch; batches of one shape share the program."""
    loss = make_loss(model)

    def sum_loss(params, batch):
        return loss(params, batch, None)[0]

    return jax.jit(jax.value_and_grad(sum_loss))


@functools.cache
def single_device(model, num_microbatches=1, empty=None, length=16):
    """Loss and gradients of the micro-batches one by one, with the plain operations, added up."""
    with jax.enable_x64(True):
        run = on_one_device(model)
        whole = with_token_keys(make_batch(length=length, empty=empty), KEY)
        found = []
        for first in range(num_microbatches):
            rows = slice(first, None, num_microbatches)
            microbatch = {name: array[rows] for name, array in whole.items()}
            found.append(run(make_params(model), microbatch))
        return jax.tree.map(lambda *leaves: sum(leaves), *found)


def make_region(
    model,
    config: MeshConfig,
    *,
    num_microbatches=1,
    trainable=".*",
    dtype="float64",
    attend=pallas_attention,
    strategy=None,
) -> Region:
    """The region of a mesh of the first devices, with its ring and its pipeline's schedule."""
    specs = make_specs(parameter_table(model), config)
    is_chunked = isinstance(strategy, FullyPipelined)
    layout = Chunked(strategy.chunk_tokens) if is_chunked else Contiguous()
    if config.ring > 1:
        layout = Zigzag(config.ring)
        attend = ring_attention(
            ring=config.ring,
            num_ulysses=config.sequence // config.ring,
            uses_permute=config.pipeline == 1,
        )
    schedule = None
    if config.pipeline > 1:
        schedule = make_schedule(
            config.schedule, config.pipeline, config.num_chunks, num_microbatches
        )
    return Region(
        mesh=make_mesh(config, jax.devices()[: math.prod(config.sizes)]),
        specs=specs,
        operations=make_operations(config, specs, attention=attend, reduction=dtype),
        num_microbatches=num_microbatches,
        schedule=schedule,
        token_layout=layout,
        reduction=dtype,
        trainable=trainable,
    )


@functools.lru_cache(maxsize=NUM_PROGRAMS)
def gradient_on_mesh(
    model,
    config: MeshConfig,
    loss=None,
    *,
    num_microbatches=1,
    trainable=".*",
    dtype="float64",
    **execution,
):
    """(region, compiled gradient); tests with the same arguments share the program.

    Args:
        model, config: of the region.
        loss: of a batch; None for that of pretraining.
        num_microbatches, trainable, dtype: as `Region`.
        execution: as `ExecutionConfig`, for the loss of pretraining.
    """
    region = make_region(
        model,
        config,
        num_microbatches=num_microbatches,
        trainable=trainable,
        dtype=dtype,
        strategy=execution.get("strategy"),
    )
    loss = loss or make_loss(model, dtype, **execution)
    return region, jax.jit(region.gradient(loss))


def on_mesh(model, loss=None, *, empty=None, length=16, **settings):
    """Sums and gradients on a mesh, the gradients of layer stacks in canonical order.

    Args:
        model: the model.
        loss: as `gradient_on_mesh`.
        empty, length: as `make_batch`.
        settings: fields of `MeshConfig`, and what `gradient_on_mesh` takes.
    """
    axes = {field.name for field in dataclasses.fields(MeshConfig)}
    sizes = {name: value for name, value in settings.items() if name in axes}
    others = {name: value for name, value in settings.items() if name not in axes}
    region, run = gradient_on_mesh(model, MeshConfig(**sizes), loss, **others)
    dtype = others.get("dtype", "float64")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), make_params(model))
    stored = region.specs.layout.store(params, region.specs.dims)
    sums, gradients = run(stored, make_batch(length=length, empty=empty), KEY)
    return sums, canonical(region.specs, gradients)


def canonical(specs: Specs, gradients):
    """Gradients with their layer stacks in the order of the layers; None stays None."""

    def letters(dims, gradient):
        return None if gradient is None else dims

    def is_none(leaf):
        return leaf is None

    dims = jax.tree.map(letters, specs.dims, gradients, is_leaf=is_none)
    return specs.layout.restore(gradients, dims)


def assert_equal_to_single_device(result, wanted, empty=None, length=16):
    """Equal loss and gradients, and as many valid tokens as the batch has."""
    (loss, weight, metrics), gradients = result
    wanted_loss, wanted_gradients = wanted
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-12)
    num_valid = make_batch(length=length, empty=empty)["weights"].sum()
    assert weight == num_valid
    if "load" in metrics:
        num_choices = NUM_ACTIVE * num_valid
        np.testing.assert_array_equal(metrics["load"].sum(1), num_choices)
    errors = relative_errors(gradients, wanted_gradients)
    assert all(error < 1e-11 for error in errors.values()), errors


def relative_errors(gradients, wanted) -> dict[str, float]:
    """By path: norm of the difference over the norm; of a zero, the norm of the difference."""
    found = {}
    flat_gradients, flat_wanted = tree.flatten(gradients), tree.flatten(wanted)
    assert flat_gradients.keys() == flat_wanted.keys()
    for path, want in flat_wanted.items():
        difference = np.linalg.norm(flat_gradients[path] - want)
        found[path] = difference / (np.linalg.norm(want) or 1)
    return found
