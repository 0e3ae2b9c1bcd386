"""Machines that are not here: reading collectives off compiled text, and what is traced for their GPUs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding

from jaxscale.launch.ahead_of_time import (
    Collective,
    as_on_gpus,
    collective_bytes,
    collectives,
    described_devices,
    device_memory_bytes,
    has_plugin,
    memory_of,
)
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.attention import AttentionContext, attention
from jaxscale.ops.loss import token_loss
from jaxscale.ops.moe import grouped_ffn
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch
from jaxscale.parallel.mesh import BATCH_SPEC, MeshConfig, make_mesh
from jaxscale.parallel.pipeline.schedule import make_schedule
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.train.losses import NextTokenLoss
from jaxscale.train.state import abstract_state
from jaxscale.train.step import make_step
from jaxscale.types import InputError

needs_plugin = pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
MODEL = ModelConfig(
    vocab_size=512,
    num_layers=2,
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=256,
    max_length=128,
)


def test_bytes_are_read_from_the_text():
    hlo = """
      %a = ((f32[2,3]{1,0}), f32[4,3]{1,0}) all-gather-start(%x), channel_id=1
      %b = f32[4,3]{1,0} all-gather-done(%a)
      %c = (bf16[8]{0}, f32[]) all-reduce(%y, %z), to_apply=%add
      ROOT %d = pred[5]{0} collective-permute(%c)
    """
    found = collective_bytes(hlo)
    assert found["all-gather"] == [48]
    assert found["all-reduce"] == [20]
    assert found["collective-permute"] == [5]
    assert found["reduce-scatter"] == found["all-to-all"] == []


def test_only_results_are_counted():
    """An asynchronous start also has the operands in its type, nested or, from jax 0.10, side by side."""
    hlo = """
      %a = (f32[2,3]{1,0}, f32[4,3]{1,0}) all-gather-start(%x), channel_id=1
      %b = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=2
      %c = (f32[5]{0}, f32[7]{0}) all-reduce-start(%x, %y), channel_id=3
      %d = ((f32[5]{0}, f32[6]{0}), f32[7]{0}) ragged-all-to-all-start(%x, %y), channel_id=4
    """
    found = collective_bytes(hlo)
    assert found["all-gather"] == [48]
    assert found["collective-permute"] == [20]
    assert found["all-reduce"] == [48]
    assert found["ragged-all-to-all"] == [28]
    assert found["all-to-all"] == []


LOOPS = """HloModule jit_step, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%inner (x: f32[2]) -> f32[2] {
  ROOT %a = f32[2]{0} all-reduce(%x), to_apply=%add
}

%branch (x: f32[2]) -> f32[2] {
  ROOT %b = f32[4]{0} all-gather(%x)
}

%outer (x: f32[2]) -> f32[2] {
  %w = f32[2]{0} while(%x), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %c = f32[2]{0} conditional(%i, %w, %w), branch_computations={%branch, %inner}
}

%open (x: f32[2]) -> f32[2] {
  ROOT %d = f32[1]{0} reduce-scatter(%x)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %v = f32[2]{0} while(%x), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %u = f32[2]{0} while(%v), condition=%less, body=%open
  ROOT %e = f32[2]{0} all-reduce(%u), to_apply=%add
}
"""


def test_loops_are_multiplied_out():
    """Loops in loops, the branch of a conditional that sends most, and a loop that does not say how long it is."""
    assert collectives(LOOPS) == [
        Collective("all-reduce", 8, 5 * 3, is_exact=True),
        Collective("all-gather", 16, 5, is_exact=True),
        Collective("reduce-scatter", 4, 1, is_exact=False),
        Collective("all-reduce", 8, 1, is_exact=True),
    ]


@needs_plugin
def test_loops_of_a_compiled_module_are_multiplied_out():
    """Whatever iterations the compiler peels off."""
    mesh = make_mesh(MeshConfig(data=8), described_devices("h200", num_hosts=1, gpus_per_host=8))

    def body(x, _):
        return jnp.sin(jax.lax.psum(x, "data")), None

    run = jax.shard_map(
        lambda x: jax.lax.scan(body, x, length=7)[0],
        mesh=mesh,
        in_specs=BATCH_SPEC,
        out_specs=BATCH_SPEC,
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((8, 256), "float32", sharding=NamedSharding(mesh, BATCH_SPEC))
    compiled = jax.jit(run).lower(x).compile()
    found = collectives(compiled.as_text())
    assert sum(each.times for each in found) == 7
    assert {(each.kind, each.num_bytes, each.is_exact) for each in found} == {
        ("all-reduce", 1024, True)
    }
    memory = memory_of(compiled)
    assert memory.arguments == memory.outputs == 1024
    assert memory.peak == 2048 + memory.temporaries


@needs_plugin
def test_attention_is_that_of_the_described_gpus():
    """cuDNN's calls forward and backward, where this process has no GPU; and afterwards none is chosen."""
    devices = described_devices("h200", num_hosts=1, gpus_per_host=1)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    q, k = (
        jax.ShapeDtypeStruct((2, 64, heads, 64), "bfloat16", sharding=sharding) for heads in (4, 2)
    )

    def loss(q, k, v):
        context = AttentionContext(jnp.tile(jnp.arange(64), (2, 1)))
        return attention(q, k, v, context)[0].astype("float32").sum()

    with as_on_gpus(devices):
        hlo = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile().as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in hlo and '__cudnn$fmhaSoftmax"' in hlo
    assert jax.default_backend() == "cpu"
    assert (
        "cudnn"
        not in jax.jit(lambda q, k: loss(q, k, k))
        .lower(*(each.update(sharding=None) for each in (q, k)))
        .as_text()
    )


@needs_plugin
@pytest.mark.parametrize(
    ("head_dim", "call"), [(64, r"@__cudnn\$fmhaSoftmax\("), (128, r"call @forward(_\d+)?\(")]
)
@pytest.mark.parametrize(("remat", "times"), [("full", 2), ("dots", 1)])
def test_attention_is_recomputed_only_by_full_remat(remat, times, head_dim, call):
    """The forward calls of cuDNN, or of our kernel, in the program of one layer's gradient."""
    if head_dim == 128 and jax.__version_info__ < (0, 11):
        pytest.skip(
            "our kernel refuses jax 0.10, which cannot put a kernel that writes to a reference into a scan"
        )
    devices = described_devices("h200", num_hosts=1, gpus_per_host=1)
    model = dataclasses.replace(MODEL, num_layers=1, head_dim=head_dim)
    loss = NextTokenLoss(
        model, Policy(), StackConfig(num_loss_chunks=1, remat=remat, is_scanned=False)
    )
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), "float32"))
    batch = {
        name: jax.ShapeDtypeStruct((2, 128), "int32")
        for name in ("tokens", "labels", "positions", "weights")
    }
    params, batch = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), (params, batch))
    with as_on_gpus(devices):
        hlo = jax.jit(jax.grad(lambda p, b: loss(p, b, None)[0])).lower(params, batch).as_text()
    assert len(re.findall(call, hlo)) == times


@needs_plugin
@pytest.mark.parametrize(
    "sizes",
    [
        dict(tensor=4),
        pytest.param(dict(sequence=2, expert=2), marks=pytest.mark.long),
        pytest.param(dict(pipeline=2, tensor=2, expert_axis="tensor"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_kernels_are_taken_on_every_axis_whatever_a_device_s_share(sizes, caplog):
    """A share of the vocabulary, of an expert's width and of the rows that is no multiple of a tile."""
    config = MeshConfig(**sizes)
    model = dataclasses.replace(
        MODEL,
        vocab_size=1000,
        num_heads=8,
        num_kv_heads=4,
        moe_pattern=(True,),
        num_experts=4,
        expert_dim=72,
        router="sparsemixer_v2",
        use_head_bias=True,
    )
    mesh = make_mesh(config, described_devices("h200", num_hosts=1, gpus_per_host=4))
    specs, num_microbatches = make_specs(parameter_table(model), config), config.pipeline
    operations = make_operations(config, specs, attention=attention, reduction="float32")
    schedule = make_schedule("1f1b", 2, 1, 2) if config.pipeline > 1 else None
    region = Region(mesh, specs, operations, num_microbatches=num_microbatches, schedule=schedule)
    loss = NextTokenLoss(model, Policy(), StackConfig(num_loss_chunks=1))
    state = abstract_state(
        model, optax.sgd(1e-3), mesh=mesh, specs=specs, dtype="float32", trainable=".*"
    )
    batch = abstract_batch(mesh, 4, 120, is_packed=True)
    with as_on_gpus(mesh.devices.flat), caplog.at_level("INFO", logger="jaxscale"):
        make_step(loss, optax.sgd(1e-3), region, state).lower(state, batch)
    backends = {
        tuple(record.getMessage().split(" for ")[0].split(": backend "))
        for record in caplog.records
    }
    is_new = jax.__version_info__ >= (0, 11)  # an older one these kernels refuse
    assert backends == {
        ("attention", "mosaic" if is_new else "cudnn"),
        ("experts", "mosaic"),
        ("cross-entropy", "mosaic"),
        *([("norm", "mosaic")] if is_new else []),
    }


def temporaries_on_a_gpu(f, arguments, differentiated):
    """Bytes of f's program, and of that of its gradient, beside arguments and results; its kernels are a GPU's."""
    devices = described_devices("h200", num_hosts=1, gpus_per_host=1)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    arguments = [jax.ShapeDtypeStruct(*argument, sharding=sharding) for argument in arguments]
    with as_on_gpus(devices):
        programs = f, jax.grad(f, tuple(range(differentiated)))
        return [
            memory_of(jax.jit(program).lower(*arguments).compile()).temporaries
            for program in programs
        ]


@pytest.mark.long
@needs_plugin
def test_experts_keep_no_product_of_every_row_and_every_expert():
    """Which would be 16 times what is needed, and is how a grouped matmul is made of plain ones."""
    rows, experts, depth, width = 2048, 16, 512, 512

    def f(x, gate, up, down, sizes):
        weights = dict(gate=gate, up=up, down=down)
        return grouped_ffn(x, sizes, weights, "swiglu").astype("float32").sum()

    shapes = (rows, depth), *[(experts, depth, width)] * 2, (experts, width, depth)
    arguments = [(shape, "bfloat16") for shape in shapes] + [((experts,), "int32")]
    assert max(temporaries_on_a_gpu(f, arguments, 4)) < rows * experts * width


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
    with pytest.raises(InputError, match="machine: given 'h300', expected one of 'h200'"):
        described_devices("h300", num_hosts=1, gpus_per_host=8)
