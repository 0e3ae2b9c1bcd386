"""Milliseconds of Phi-3-small's block-sparse attention: ours, and torch's flex_attention, compiled.

Both in one process and on the same shapes.

python experiments/bench/block_sparse.py  # with 64: smaller blocks of the peer's mask than its 128
"""

import functools
import sys

import torch
from attention import block_sparse, draw, measure, ours
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout

SHAPES = ((4, 4096, 32, 8, 128), (4, 8192, 32, 8, 128), (1, 32768, 32, 8, 128))  # B, T, N, K, H
REPEATS, ROUNDS = 10, 3
LOCAL, STRIDE = BlockLayout().local, BlockLayout().stride


def sees(batch, head, query, key):
    """Phi-3-small's mask, as flex_attention takes it."""
    near = query // BLOCK - key // BLOCK < LOCAL
    column = (key // BLOCK + head + 1) % STRIDE == 0
    return (query >= key) & (near | column)


def seconds(run):
    """Of the fastest round; the first call compiles."""
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(ROUNDS):
        start.record()
        for _ in range(REPEATS):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / REPEATS)
    return min(times)


def flex(shape, mask_block):
    """Seconds of the forward, and of the forward with the backward."""
    batch, length, heads, kv_heads, head_dim = shape
    mask = create_block_mask(sees, None, heads, length, length, BLOCK_SIZE=mask_block)

    def make(num):
        size = (batch, num, length, head_dim)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, k, v, do = make(heads), make(kv_heads), make(kv_heads), make(heads).detach()
    tiles = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    options = dict.fromkeys(tiles, mask_block) if mask_block < 128 else None
    settings = dict(block_mask=mask, enable_gqa=True, kernel_options=options)
    compiled = torch.compile(functools.partial(flex_attention, **settings))

    def both():
        torch.autograd.grad(compiled(q, k, v), (q, k, v), do)

    def forward():
        with torch.no_grad():
            compiled(q, k, v)

    return seconds(forward), seconds(both)


def main(mask_block=128):
    """One row a shape."""
    print("| shape | ours: forward, with backward | flex_attention | ratios |\n|---|---|---|---|")
    for shape in SHAPES:
        mine = measure(ours, block_sparse(shape[1]), draw(shape))
        peer = flex(shape, int(mask_block))
        cells = [f"{a * 1e3:.3f} ms, {b * 1e3:.3f} ms" for a, b in (mine, peer)]
        ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(peer, mine, strict=True))
        print(f"| {shape} | {' | '.join(cells)} | {ratios} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
