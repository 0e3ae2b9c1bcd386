"""What cannot fit is refused by arithmetic: bytes needed on a device, bytes there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.launch import memory
from jaxscale.launch.memory import GIB, bytes_on_one_device, check_fits, host_bytes
from jaxscale.parallel.mesh import DATA, MeshConfig, make_mesh
from jaxscale.types import InputError

MESH = make_mesh(MeshConfig(data=2), jax.devices()[:2])


def leaf(size, spec=PartitionSpec(), dtype="float32"):
    return jax.ShapeDtypeStruct((size,), jnp.dtype(dtype), sharding=NamedSharding(MESH, spec))


def test_a_device_holds_its_shards():
    whole, half = leaf(10), leaf(10, PartitionSpec(DATA), "bfloat16")
    assert bytes_on_one_device({"a": whole, "b": half}) == 10 * 4 + 5 * 2


@pytest.mark.parametrize(
    ("files", "there"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable:  16777216 kB\n"}, 16),
        (
            {"meminfo": "MemAvailable: 16777216 kB\n", "memory.max": "max", "memory.current": "1"},
            16,
        ),
        (
            {
                "meminfo": "MemAvailable: 16777216 kB\n",
                "memory.max": f"{9 * GIB}",
                "memory.current": f"{GIB}",
            },
            8,
        ),
    ],
    ids=["host", "no limit", "container"],
)
def test_the_devices_of_a_cpu_share_the_host_s_memory(files, there, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    share = there * GIB // jax.local_device_count()
    fits = leaf(share // 4)
    check_fits("model", {"parameters": fits})
    expected = (
        r"model: given '.* GiB a device: .* of parameters \+ .* of gradients', expected at most"
    )
    with pytest.raises(InputError, match=expected):
        check_fits("model", {"parameters": fits, "gradients": leaf(8)})


def test_nothing_is_refused_where_nobody_says_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert host_bytes() is None
    check_fits("model", {"parameters": leaf(1 << 50)})
