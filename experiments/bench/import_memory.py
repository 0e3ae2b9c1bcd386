"""Host memory of an import: the most that reading a sharded folder adds, over its largest shard.

A random model in the 1.1B Llama shape is written in shards and read onto the device, by a process
each. The reading one's compilations come first, with a small model.

python experiments/bench/import_memory.py  # --tiny tries it
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxscale.convert.folder import open_folder, write_folder
from jaxscale.models.config.facts import from_flat
from jaxscale.models.parameters import abstract_params, init_params, parameter_table

SIZES = dict(num_layers=16, model_dim=2048, num_heads=16, num_kv_heads=8, head_dim=128)
TINY = dict(num_layers=4, model_dim=64, num_heads=4, num_kv_heads=2, head_dim=16)


def write(folder, sizes, ffn_dim, vocab_size, max_shard_bytes):
    """A folder with random weights in bfloat16."""
    model = from_flat(vocab_size=vocab_size, ffn_dim=ffn_dim, max_length=4096, **sizes)
    draw = functools.partial(init_params, parameter_table(model), dtype="bfloat16")
    params = jax.jit(draw)(jax.random.key(0))
    dtype = np.dtype(ml_dtypes.bfloat16)
    write_folder(folder, model, params, dtype=dtype, max_shard_bytes=max_shard_bytes)


def read(folder):
    """Puts a folder's weights onto the first device."""
    opened = open_folder(folder)
    device = SingleDeviceSharding(jax.devices()[0])
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        abstract_params(parameter_table(opened.config), "bfloat16"),
    )
    return jax.block_until_ready(opened.params(stored))


def peak_bytes():
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_both(folder, is_tiny):
    """A small folder, and unless it is only tried a large one."""
    write(folder / "small", TINY, 256, 512, 1 << 20)
    if not is_tiny:
        write(folder / "model", SIZES, 8192, 32064, 400_000_000)


def measure(folder, is_tiny):
    """Prints one JSON line."""
    read(folder / "small")
    before = peak_bytes()
    written = folder / ("small" if is_tiny else "model")
    params = read(written)
    added = peak_bytes() - before
    largest = max(path.stat().st_size for path in written.glob("*.safetensors"))
    figures = {
        "device": jax.devices()[0].device_kind,
        "weights_mib": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) >> 20,
        "largest_shard_mib": largest >> 20,
        "added_mib": added >> 20,
        "ratio": added / largest,
    }
    print(json.dumps(figures), flush=True)


PARTS = {"write": write_both, "read": measure}


def main():
    """Runs both parts, each in a process of its own, so that the GPU has one at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.part:
        PARTS[options.part](options.folder, options.tiny)
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            words = [sys.executable, *sys.argv, "--part", part, "--folder", folder]
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
