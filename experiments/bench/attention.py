"""TFLOP/s of attention on one GPU, ours beside cuDNN and XLA in one process.

Unseen pairs do not count.

python experiments/bench/attention.py           # our kernels for Hopper GPUs
python experiments/bench/attention.py triton    # others of ours, one row each
"""

import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention import attention as ops_attention

SHAPES = (
    (4, 4096, 32, 8, 128),
    (1, 8192, 32, 8, 128),
    (1, 32768, 32, 8, 128),
    (4, 4096, 32, 32, 128),
    (4, 4096, 32, 32, 96),
    (8, 4096, 32, 32, 64),
)  # B, T, N, K, H
REPEATS, ROUNDS, TILE = 10, 3, 128
HEADER = """\
| shape, mask | backend | TFLOP/s forward, with backward | ms | rate by visited tiles |
|---|---|---|---|---|"""


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each token sees.

    Args:
        first_key: [T] first key that each token sees; the last is its own.
        num_pairs: pairs of query and key that are seen, of one head and sequence.
        num_tiles: tiles of TILE x TILE pairs that a kernel must visit.
        layout: block-sparse layout, if there is one.
    """

    name: str
    first_key: np.ndarray
    num_pairs: float
    num_tiles: float
    layout: BlockLayout | None = None


def interval(name, first_key):
    """The mask of tokens that see all keys from `first_key` to their own."""
    length = len(first_key)
    ends = np.arange(1, length + 1)
    last_tile = np.arange(length // TILE) + 1
    return Mask(
        name,
        first_key,
        num_pairs=(ends - first_key).sum(),
        num_tiles=(last_tile - first_key[::TILE] // TILE).sum(),
    )


def documents(length, mean):
    """First key of each token where documents of random length stand one after the other."""
    rng = np.random.default_rng(0)
    lengths = rng.exponential(mean, length // 512).astype(int) + 1
    ends = np.cumsum(lengths)
    document = np.searchsorted(ends, np.arange(length), side="right")
    return (ends - lengths)[document]


def block_sparse(length):
    """Phi-3-small's mask."""
    layout, num_blocks = BlockLayout(), length // BLOCK
    seen_blocks = layout.sees(num_blocks).sum() / layout.stride
    unseen_in_diagonal = BLOCK * (BLOCK - 1) // 2
    return Mask(
        "blocks of Phi-3-small",
        np.zeros(length, int),
        num_pairs=BLOCK**2 * seen_blocks - num_blocks * unseen_in_diagonal,
        num_tiles=seen_blocks / 4,
        layout=layout,
    )


def masks(length):
    """Causal, and others where the sequence is long."""
    yield interval("causal", np.zeros(length, int))
    if length > 8192:
        yield interval("documents of mean 4096", documents(length, 4096))
        yield interval("window of 2048", np.maximum(np.arange(length) - 2047, 0))
        yield block_sparse(length)


def kernel(q, k, v, low, high, layout, implementation):
    """One of our kernels."""
    scale = q.shape[-1] ** -0.5
    o, *_ = attention(
        q,
        k,
        v,
        low,
        high,
        scale=scale,
        layout=layout,
        implementation=implementation,
    )
    return o


def cudnn(q, k, v, low, high, layout, implementation):
    """cuDNN, causal."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def xla(q, k, v, low, high, layout, implementation):
    """A chunk of queries at a time, causal."""
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    o, _ = ops_attention(q, k, v, AttentionContext(positions), implementation="chunked")
    return o


def with_gradients(f):
    """Output and the three gradients of its product with `do`."""

    def run(do, q, k, v, *bounds):
        o, pullback = jax.vjp(lambda q, k, v: f(q, k, v, *bounds), q, k, v)
        return o, *pullback(do)

    return run


PEERS = {"cudnn": cudnn, "xla": xla}
LONGEST = {"cudnn": np.inf, "xla": 8192}  # tokens, beyond which it takes too long


def seconds(f, *arrays):
    """Of the fastest round; the first call compiles."""
    run, best = jax.jit(f), np.inf
    jax.block_until_ready(run(*arrays))
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            result = run(*arrays)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - began) / REPEATS)
    return best


def draw(shape):
    """Random do, q, k and v in bfloat16."""
    B, T, N, K, H = shape
    heads = (N, N, K, K)
    return [
        jax.random.normal(jax.random.key(i), (B, T, n, H), jnp.bfloat16)
        for i, n in enumerate(heads)
    ]


def measure(implementation, mask, arrays):
    """Seconds of the forward, and of the forward with the backward."""
    _, q, k, v = arrays
    ends = np.arange(len(mask.first_key)) + 1
    bounds = [jnp.asarray(each[None], jnp.int32) for each in (mask.first_key, ends)]
    f = PEERS.get(implementation, kernel)
    run = functools.partial(f, layout=mask.layout, implementation=implementation)
    forward = seconds(run, q, k, v, *bounds)
    return forward, seconds(with_gradients(run), *arrays, *bounds)


def main(families):
    """One row per shape, mask and backend; tiles per second relative to the first causal one."""
    print(HEADER)
    for shape in SHAPES:
        B, T, N, K, H = shape
        arrays, causal_rates = draw(shape), None
        for mask in masks(T):
            tflop = 4 * H * B * N * mask.num_pairs / 1e12
            peers = [name for name in PEERS if LONGEST[name] >= T and mask.name == "causal"]
            for name in (*families, *peers):
                forward, both = measure(name, mask, arrays)
                rates = mask.num_tiles / forward, mask.num_tiles / both
                causal_rates = causal_rates or rates
                relative = [a / b for a, b in zip(rates, causal_rates, strict=True)]
                # The backward counts 2.5 times the forward.
                cells = [
                    f"{B}x{T}x{N}/{K}x{H} {mask.name}",
                    name,
                    f"{tflop / forward:.0f}, {3.5 * tflop / both:.0f}",
                    f"{forward * 1e3:.2f}, {both * 1e3:.2f}",
                    f"{relative[0]:.2f}, {relative[1]:.2f}",
                ]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["mosaic"])
