"""The Evoformer's attention on one GPU, forward and with its backward, beside its peers.

Prints a line of JSON for each shape, peer and pass: milliseconds, GiB of temporaries, TFLOP/s (the
backward counts 2.5 times the forward), the floor below which no program can be, and how far the
results are from those in chunks. q, k and v are bfloat16, the biases float32, both with gradients.

python experiments/bench/evoformer_attention.py               # ours, and cuequivariance_jax's
python experiments/bench/evoformer_attention.py --peer torch  # its attention with a summed bias
"""

import argparse
import functools
import importlib.util
import json
import math
import time

import jax
import jax.numpy as jnp

from jaxscale.kernels import tuning
from jaxscale.launch.ahead_of_time import memory_of
from jaxscale.ops.attention.evoformer import evoformer_attention

# Rows, queries and keys, heads, width: two of DeepSpeed's tests, an alignment, pairs.
SHAPES = (
    (256, 256, 4, 32),
    (512, 256, 8, 8),
    (512, 384, 8, 32),
    (384, 384, 4, 32),
    (1024, 1024, 4, 32),
)
IN_A_ROW = 5  # by one program, so that the host's calls do not count
BYTES_PER_S, FLOPS_PER_S = 4.3e12, 700e12  # that an H200 has reached
REPEATS, ROUNDS = 20, 3
GIB = 2**30


def flops(shape, passed):
    """Of the products that no algorithm can do without."""
    rows, length, heads, width = shape
    forward = 4 * rows * heads * length**2 * width
    return forward * (3.5 if passed == "with backward" else 1)


def floor_ms(shape, passed):
    """The longer of what memory and tensor cores take, each operand and result moved once."""
    rows, length, heads, width = shape
    array = 2 * rows * length * heads * width
    biases = 4 * (rows * length + heads * length**2)
    moved = 4 * array + biases
    if passed == "with backward":
        moved += 8 * array + 2 * biases
    return 1e3 * max(moved / BYTES_PER_S, flops(shape, passed) / FLOPS_PER_S)


def draw(shape):
    """do, q, k, v and both biases; one key in eight is hidden."""
    rows, length, heads, width = shape
    keys = jax.random.split(jax.random.key(0), 6)
    size = (1, rows, length, heads, width)
    arrays = [jax.random.normal(key, size, jnp.bfloat16) for key in keys[:4]]
    hidden = jax.random.bernoulli(keys[4], 1 / 8, (1, rows, 1, 1, length))
    mask_bias = jnp.where(hidden, -1e9, 0.0)
    return *arrays, mask_bias, jax.random.normal(keys[5], (1, 1, heads, length, length))


def cuequivariance(q, k, v, mask_bias, pair_bias):
    """NVIDIA's kernel, whose mask is boolean and has no gradient."""
    from cuequivariance_jax import triangle_attention

    by_head = (jnp.swapaxes(x, 2, 3) for x in (q, k, v))
    o, *_ = triangle_attention(*by_head, pair_bias, mask_bias > -1, q.shape[-1] ** -0.5)
    return jnp.swapaxes(o, 2, 3)


def peers():
    """Name -> function of q, k, v and both biases."""
    found = {
        name: functools.partial(evoformer_attention, implementation=name)
        for name in ("chunked", "triton")
    }
    if importlib.util.find_spec("cuequivariance_jax"):
        found["cuequivariance"] = cuequivariance
    return found


def passes(f):
    """Name -> function of do and the operands: the output, also with all gradients."""

    def with_backward(do, *operands):
        o, pullback = jax.vjp(f, *operands)
        return o, *pullback(do)

    return {"forward": lambda do, *operands: (f(*operands),), "with backward": with_backward}


def again(f, *arrays):
    """What f gives of the arrays, IN_A_ROW times one after the other."""
    for _ in range(IN_A_ROW):
        arrays, found = jax.lax.optimization_barrier((arrays, f(*arrays)))
    return found


def difference(found, expected):
    """Norm of the difference over that of what is expected: the largest, without the mask's."""
    names = (0, 1, 2, 3, 5) if len(found) > 1 else (0,)
    pairs = [(found[i].astype("float32"), expected[i].astype("float32")) for i in names]
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def show(shape, peer, passed, ms, temporaries, **others):
    """One line."""
    row = dict(
        shape=shape,
        peer=peer,
        passed=passed,
        ms=round(ms, 4),
        temporaries_gib=round(temporaries / GIB, 3),
        tflop_per_s=round(flops(shape, passed) / ms / 1e9, 1),
        floor_ms=round(floor_ms(shape, passed), 4),
    )
    print(json.dumps(row | others), flush=True)


def measure_ours(shape):
    """The peers that JAX calls, in one process."""
    arrays, expected = draw(shape), {}
    for peer, f in peers().items():
        for passed, run in passes(f).items():
            once = jax.jit(run).lower(*arrays).compile()
            found = once(*arrays)
            expected.setdefault(passed, found)
            repeated = jax.jit(functools.partial(again, run)).lower(*arrays).compile()
            ms = tuning.milliseconds(repeated, arrays) / IN_A_ROW
            apart = difference(found, expected[passed])
            show(shape, peer, passed, ms, memory_of(once).temporaries, difference=f"{apart:.1e}")


def measure_torch(shape):
    """Torch's attention, whose bias is the sum of both, written for every row and head."""
    import torch

    rows, length, heads, width = shape
    make = functools.partial(torch.randn, device="cuda")
    size = (rows, length, heads, width)
    q, k, v, do = (make(size, dtype=torch.bfloat16, requires_grad=i < 3) for i in range(4))
    mask_bias = torch.where(make(rows, 1, 1, length) > 1.15, -1e9, 0.0).requires_grad_()
    pair_bias = make(1, heads, length, length, requires_grad=True)
    operands = q, k, v, mask_bias, pair_bias

    def forward():
        bias = (mask_bias + pair_bias).to(q.dtype)
        by_head = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(*by_head, attn_mask=bias)
        return o.transpose(1, 2)

    def alone():
        with torch.no_grad():
            return (forward(),)

    def with_backward():
        o = forward()
        return o, *torch.autograd.grad(o, operands, do)

    for passed, run in {"forward": alone, "with backward": with_backward}.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = sum(each.nbytes for each in run())
        temporaries = torch.cuda.max_memory_allocated() - before - results
        show(shape, f"torch {torch.__version__}", passed, torch_milliseconds(run), temporaries)


def torch_milliseconds(run):
    """Of the fastest round."""
    import torch

    fastest = math.inf
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
        fastest = min(fastest, (time.perf_counter() - began) / REPEATS)
    return fastest * 1e3


def main():
    """All shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=("torch",), help="this one alone")
    is_torch = parser.parse_args().peer == "torch"
    for shape in SHAPES:
        (measure_torch if is_torch else measure_ours)(shape)


if __name__ == "__main__":
    main()
