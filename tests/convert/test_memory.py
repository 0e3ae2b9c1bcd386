"""What an import takes of the host's memory while it spreads weights over devices."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxscale.convert.folder import open_folder, write_folder
from jaxscale.models.config.facts import from_flat
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.rules import make_specs
from jaxscale.train.state import stored_params

SIZES = dict(model_dim=1024, num_heads=8, num_kv_heads=8, head_dim=128, ffn_dim=4096)


@pytest.mark.long
def test_an_import_over_a_mesh_takes_little_more_than_a_shard(tmp_path):
    """Of arrays outside of devices: at most 1.3 times the largest file."""
    model = from_flat(vocab_size=8192, num_layers=8, max_length=128, **SIZES)
    table = parameter_table(model)
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract_params(table, "bfloat16"))
    dtype = np.dtype(ml_dtypes.bfloat16)
    write_folder(tmp_path, model, empty, dtype=dtype, max_shard_bytes=50_000_000)
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(shards) > 4
    mesh = MeshConfig(data=4, zero=3)
    devices = make_mesh(mesh, jax.devices()[:4])
    stored = stored_params(table, devices, make_specs(table, mesh), "bfloat16")
    folder = open_folder(tmp_path)
    tracemalloc.start()
    try:
        folder.params(stored)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 1.3 * max(shards)
