"""Machines that are not here: what is traced and compiled for their GPUs, and what JAX asks."""

import collections
import re
import types

import jax
import jax.numpy as jnp
import pytest

from jaxscale.launch import ahead_of_time
from jaxscale.launch.ahead_of_time import (
    as_on,
    compile_with_host,
    described_devices,
    device_memory_bytes,
    has_plugin,
    memory_of,
)
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.attention import AttentionContext, attention
from jaxscale.ops.loss import token_loss
from jaxscale.ops.moe import grouped_ffn
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import make_setup
from jaxscale.train.step import make_step
from jaxscale.types import InputError

needs_plugin = pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
MODEL = dict(
    vocab_size=512,
    num_layers=2,
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=256,
    max_length=128,
)


def attention_loss(q, k, v):
    context = AttentionContext(jnp.tile(jnp.arange(64), (2, 1)))
    o, _ = attention(q, k, v, context)
    return o.astype("float32").sum()


ATTENTION = jax.jit(jax.grad(attention_loss, (0, 1, 2)))


def attention_arguments(sharding=None):
    """q, k and v."""
    shapes = [(2, 64, num_heads, 64) for num_heads in (4, 2, 2)]
    return [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding) for shape in shapes]


@needs_plugin
def test_attention_is_that_of_the_described_gpus():
    """cuDNN's calls forward and backward, where this process has no GPU; and afterwards none."""
    devices = described_devices("h200", num_hosts=1, gpus_per_host=1)
    arguments = attention_arguments(jax.sharding.SingleDeviceSharding(devices[0]))
    with as_on(devices):
        hlo = ATTENTION.lower(*arguments).compile().as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in hlo and '__cudnn$fmhaSoftmax"' in hlo
    assert jax.default_backend() == "cpu"
    plain = jax.jit(lambda q, k, v: attention_loss(q, k, v))
    assert "cudnn" not in plain.lower(*attention_arguments()).as_text()


def test_every_function_that_is_replaced_is_called(monkeypatch):
    """If JAX stops to call one of its private functions, replacing it does nothing."""
    calls = collections.Counter()

    def counted(replacement):
        def call(*arguments):
            calls[replacement.name] += 1
            return replacement.function(*arguments)

        return replacement._replace(function=call)

    device = types.SimpleNamespace(
        platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200"
    )
    replacements = [counted(each) for each in ahead_of_time._answers([device])]
    monkeypatch.setattr(ahead_of_time, "_answers", lambda devices: replacements)
    with as_on([device]):
        jax.jit(jax.grad(attention_loss, (0, 1, 2))).trace(*attention_arguments())
    assert calls.keys() == {replacement.name for replacement in replacements}


def test_a_function_that_does_not_exist_is_not_replaced():
    """If JAX renames one, compiling for absent machines fails, and the others are restored."""
    before = jax.default_backend
    replacements = [
        ahead_of_time._Replacement(jax, "default_backend", lambda: "gpu"),
        ahead_of_time._Replacement(jax, "no_such_function", lambda: None),
    ]
    with (
        pytest.raises(AttributeError, match="no_such_function"),
        ahead_of_time._replaced(replacements),
    ):
        pass
    assert jax.default_backend is before


@needs_plugin
def test_arguments_and_results_are_compiled_to_rest_on_the_host():
    """JAX calls the function that is replaced for this: otherwise all were on the device."""
    (device,) = described_devices("h200", num_hosts=1, gpus_per_host=1)
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((256,), "float32", sharding=sharding)

    def add(on_host, on_device):
        total = jax.device_put(on_host, jax.memory.Space.Device) + on_device
        return jax.device_put(total, jax.memory.Space.Host), total

    lowered = jax.jit(add).lower(x, x)
    memory = memory_of(compile_with_host(lowered, arguments=[True], results=[True]))
    assert memory.host == 2 * 4 * 256
    assert memory.arguments == 4 * 256


@needs_plugin
@pytest.mark.parametrize(
    ("head_dim", "call"), [(64, r"@__cudnn\$fmhaSoftmax\("), (128, r"call @forward(_\d+)?\(")]
)
@pytest.mark.parametrize(("remat", "times"), [("full", 2), ("dots", 1)])
def test_attention_is_recomputed_only_by_full_remat(remat, times, head_dim, call):
    """The forward calls of cuDNN, or of our kernel, in the program of one layer's gradient."""
    if head_dim == 128 and jax.__version_info__ < (0, 11):
        pytest.skip("our kernel refuses jax 0.10: there no scan can hold a kernel with references")
    devices = described_devices("h200", num_hosts=1, gpus_per_host=1)
    model = from_flat(**MODEL | dict(num_layers=1, head_dim=head_dim))
    execution = ExecutionConfig(num_loss_chunks=1, remat=remat, is_scanned=False)
    loss = NextTokenLoss(model, Policy(), execution)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    params = abstract_params(parameter_table(model), "float32")
    batch = {
        name: jax.ShapeDtypeStruct((2, 128), "int32")
        for name in ("tokens", "labels", "positions", "weights")
    }
    params, batch = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), (params, batch))

    def sum_loss(params, batch):
        return loss(params, batch, None)[0]

    with as_on(devices):
        hlo = jax.jit(jax.grad(sum_loss)).lower(params, batch).as_text()
    assert len(re.findall(call, hlo)) == times


@needs_plugin
@pytest.mark.parametrize(
    ("sizes", "is_lowered"),
    [
        (dict(tensor=4), False),
        pytest.param(dict(tensor=4), True, marks=pytest.mark.long),
        pytest.param(dict(sequence=2, expert=2), True, marks=pytest.mark.long),
        pytest.param(
            dict(pipeline=2, tensor=2, expert_axis="tensor"), True, marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_kernels_are_taken_on_every_axis_whatever_a_device_s_share(sizes, is_lowered, caplog):
    """A share of the vocabulary, an expert's width and the rows that is no multiple of a tile.

    Kernels are chosen, or refuse, when a program is traced. Lowering them takes most of the time;
    tests/kernels lowers each of them alone.
    """
    config = MeshConfig(**sizes)
    changes = dict(
        vocab_size=1000,
        num_heads=8,
        num_kv_heads=4,
        moe_pattern=(True,),
        num_experts=4,
        expert_dim=72,
        router="sparsemixer_v2",
        use_head_bias=True,
    )
    model = from_flat(**MODEL | changes)
    devices = described_devices("h200", num_hosts=1, gpus_per_host=4)
    setup = make_setup(
        table=parameter_table(model),
        loss_fn=NextTokenLoss(model, Policy(), ExecutionConfig(num_loss_chunks=1)),
        mesh=config,
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(steps=1, num_microbatches=config.pipeline),
        devices=devices,
    )
    batch = abstract_batch(setup.mesh, 4, 120, is_packed=True)
    with as_on(devices), caplog.at_level("INFO", logger="jaxscale"):
        traced = make_step(setup).trace(setup.state, batch)
        if is_lowered:
            traced.lower()
    backends = set()
    for record in caplog.records:
        operation, backend = record.getMessage().split(" for ")[0].split(": backend ")
        backends.add((operation, backend))
    is_new = jax.__version_info__ >= (0, 11)  # an older one these kernels refuse
    assert backends == {
        ("attention", "mosaic" if is_new else "cudnn"),
        ("experts", "mosaic"),
        ("cross-entropy", "mosaic"),
        *([("norm", "mosaic")] if is_new else []),
    }


def temporaries_on_a_gpu(f, arguments, differentiated):
    """Bytes of f's program and of its gradient's, beside arguments and results, on a GPU."""
    devices = described_devices("h200", num_hosts=1, gpus_per_host=1)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    arguments = [jax.ShapeDtypeStruct(*argument, sharding=sharding) for argument in arguments]
    found = []
    with as_on(devices):
        for program in (f, jax.grad(f, tuple(range(differentiated)))):
            compiled = jax.jit(program).lower(*arguments).compile()
            found.append(memory_of(compiled).temporaries)
    return found


@pytest.mark.long
@needs_plugin
def test_experts_keep_no_product_of_every_row_and_every_expert():
    """That is how plain matmuls would make a grouped one, and 16 times what is needed."""
    rows, experts, depth, width = 2048, 16, 512, 512

    def f(x, gate, up, down, sizes):
        weights = dict(gate=gate, up=up, down=down)
        return grouped_ffn(x, sizes, weights, "swiglu").astype("float32").sum()

    shapes = (rows, depth), *[(experts, depth, width)] * 2, (experts, width, depth)
    arguments = [(shape, "bfloat16") for shape in shapes] + [((experts,), "int32")]
    assert max(temporaries_on_a_gpu(f, arguments, 4)) < rows * experts * width


@pytest.mark.long
@needs_plugin
def test_cross_entropy_keeps_no_logits_in_float32():
    """Two bytes a logit for the backward, and two more for their gradient while it runs."""
    tokens, vocabulary, depth = 2048, 8192, 256

    def f(h, head, labels):
        return token_loss(h, head, labels)[0].sum()

    shapes = (
        ((1, tokens, depth), "bfloat16"),
        ((vocabulary, depth), "bfloat16"),
        ((1, tokens), "int32"),
    )
    forward, both = temporaries_on_a_gpu(f, shapes, 2)
    assert forward < 1.1 * 2 * tokens * vocabulary
    assert both < 1.1 * 4 * tokens * vocabulary


def test_a_machine_has_memory():
    assert device_memory_bytes("h200") == 150_109_880_320


def test_an_unknown_machine_is_named():
    with pytest.raises(
        InputError, match="machine: given 'h300', expected one of 'a100', 'b200', 'h200'"
    ):
        described_devices("h300", num_hosts=1, gpus_per_host=8)
