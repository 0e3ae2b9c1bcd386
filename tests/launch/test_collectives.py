"""Collectives of a compiled module, read off its text: what each delivers, and how often."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxscale.launch.ahead_of_time import described_devices, has_plugin, memory_of
from jaxscale.launch.collectives import Collective, collective_bytes, collectives
from jaxscale.parallel.mesh import BATCH_SPEC, MeshConfig, make_mesh


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
    """An asynchronous start also has the operands in its type, nested or side by side."""
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
  %w = f32[2]{0} while(%x), body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %c = f32[2]{0} conditional(%i, %w, %w), branch_computations={%branch, %inner}
}

%open (x: f32[2]) -> f32[2] {
  ROOT %d = f32[1]{0} reduce-scatter(%x)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %v = f32[2]{0} while(%x), body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %u = f32[2]{0} while(%v), condition=%test, body=%open
  ROOT %e = f32[2]{0} all-reduce(%u), to_apply=%add
}
"""


def test_loops_are_multiplied_out():
    """Loops in loops, the branch that sends most, a loop that does not say how often it runs."""
    assert collectives(LOOPS) == [
        Collective("all-reduce", 8, 5 * 3, is_exact=True),
        Collective("all-gather", 16, 5, is_exact=True),
        Collective("reduce-scatter", 4, 1, is_exact=False),
        Collective("all-reduce", 8, 1, is_exact=True),
    ]


@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
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
