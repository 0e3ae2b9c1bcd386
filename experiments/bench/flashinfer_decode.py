"""Our kernel over pages beside FlashInfer's decoding kernel, in one process; microseconds a layer.

The 1.1B shape in bfloat16. FlashInfer's is called through jax-tvm-ffi, from the library that
`flashinfer_build.py` makes; its plan is made beforehand and not timed, ours is part of the kernel.

python experiments/bench/flashinfer_decode.py LIBRARY.so
"""

import ctypes
import functools
import sys
import time

import jax
import jax.numpy as jnp
import jax_tvm_ffi
import numpy as np
import tvm_ffi

from jaxscale.kernels.paged_attention.api import paged_attention

N, K, H, SIZE = 16, 8, 128, 64
LAYERS, ROUNDS = 16, 8
SCALE = H**-0.5
COLUMNS = "sequences", "ours, us", "TB/s", "FlashInfer, us", "TB/s", "relative difference"
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
CASES = {  # of sequences, with their mean length and its deviation in means
    "256 of 1,264 tokens": (256, 1264, 0),
    "256 of Normal(1,264, 0.3)": (256, 1264, 0.3),
    "75 of Normal(2,630, 0.3)": (75, 2630, 0.3),
    "16 of 8,192 tokens": (16, 8192, 0),
    "1 of 300 tokens": (1, 300, 0),
}


def draw(num, mean, deviation):
    """(lengths, table [D, P], q [D, N, H], pages of keys, of values)."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(mean, deviation * mean, num), 8, 2 * mean).astype(np.int32)
    per = -(-lengths // SIZE)
    table = np.zeros((num, per.max()), np.int32)
    for row, own in zip(table, np.split(rng.permutation(per.sum()), per.cumsum()[:-1])):
        row[: len(own)] = own
    shapes = (num, N, H), *[(per.sum(), SIZE, K, H)] * 2
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = (jax.random.normal(k, s, "bfloat16") for k, s in zip(keys, shapes, strict=True))
    return lengths, table, *arrays


def ours(lengths, table):
    """(q, k, v) -> attention."""
    table, high = jnp.asarray(table), jnp.asarray(lengths)
    return lambda q, k, v: paged_attention(
        q, k, v, table, high * 0, high, scale=SCALE, implementation="mosaic"
    )


def flashinfers(library, lengths, table, q, k):
    """Likewise; the keys' type and shapes are those of the plan."""
    per = -(-lengths // SIZE)
    starts = np.concatenate([[0], per.cumsum()]).astype(np.int32)
    pages = np.concatenate([row[:n] for row, n in zip(table, per)])
    spaces = [jax.block_until_ready(jnp.zeros(2**power, "uint8")) for power in (28, 23)]
    on_host = np.zeros(2**23, np.uint8)
    floats, integers, q_view, k_view = map(tvm_ffi.from_dlpack, (*spaces, q, k))
    host_views = map(tvm_ffi.from_dlpack, (on_host, starts))
    sizes = (len(lengths), N, K, SIZE, False, -1, 0.0, H, H)
    plan = library["plan"](floats, integers, *host_views, *sizes, q_view, k_view)
    assert ctypes.CDLL("libcuda.so.1").cuCtxSynchronize() == 0  # what is planned is on the device

    def run(q, k, v, starts, pages, ends, floats, integers, o):
        arrays = floats, integers, plan, q, k, v, starts, pages, ends, o
        library["run"](*arrays, None, 0, -1, False, None, 0.0, SCALE, 1.0, 1.0)

    name, function = f"flashinfer_{len(lengths)}_{per.sum()}", tvm_ffi.convert(run)
    settings = dict(platform="gpu", allow_cuda_graph=True, pass_owned_tensor=True)
    jax_tvm_ffi.register_ffi_target(name, function, ["args", "rets"], **settings)
    others = *map(jnp.asarray, (starts, pages, (lengths - 1) % SIZE + 1)), *spaces
    return lambda q, k, v: jax.ffi.ffi_call(name, q)(q, k, v, *others)


def microseconds(f, q, k, v):
    """The smallest of some rounds, each of layers that take the last one's output as queries."""
    run = jax.jit(lambda q, k, v: functools.reduce(lambda q, _: f(q, k, v), range(LAYERS), q))
    jax.block_until_ready([run(q, k, v) for _ in range(3)])
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready([run(q, k, v) for _ in range(4)])
        seconds.append((time.perf_counter() - began) / LAYERS / 4)
    return min(seconds) * 1e6


def main():
    library = tvm_ffi.load_module(sys.argv[1])
    print(jax.devices()[0].device_kind, HEAD, sep="\n\n")
    for name, case in CASES.items():
        lengths, table, q, k, v = draw(*case)
        both = ours(lengths, table), flashinfers(library, lengths, table, q, k)
        a, b = (jax.jit(f)(q, k, v).astype("float32") for f in both)
        cells = []
        for f in both:
            us = microseconds(f, q, k, v)
            cells += [f"{us:.1f}", f"{lengths.sum() * 4 * K * H / us / 1e6:.2f}"]
        difference = jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
        print(f"| {name} | {' | '.join(cells)} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
