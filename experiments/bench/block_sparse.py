"""Milliseconds of Phi-3-small's block-sparse attention: ours, and torch's flex_attention, compiled.

Both in one process and on the same shapes.

python experiments/bench/block_sparse.py  # with 64: smaller blocks of the peer's mask than its 128
"""

import functools
import sys

import numpy as np
import torch
from attention import block_sparse, draw, measure
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout

SHAPES = ((4, 8192, 32, 8, 128), (1, 32768, 32, 8, 128), (4, 4096, 32, 8, 128))  # B, T, N, K, H
REPEATS, ROUNDS = 10, 3
LOCAL, STRIDE = BlockLayout().local, BlockLayout().stride


def sees(batch, head, query, key):
    """Phi-3-small's mask, as flex_attention takes it."""
    near = query // BLOCK - key // BLOCK < LOCAL
    column = (key // BLOCK + head + 1) % STRIDE == 0
    return (query >= key) & (near | column)


def in_order(blocks):
    """(how many of each row are set, the numbers of all columns, those that are set first)."""
    order = np.argsort(~blocks, axis=-1, kind="stable")
    parts = blocks.sum(-1), order
    return tuple(torch.tensor(part[None], dtype=torch.int32, device="cuda") for part in parts)


def peer_mask(length, heads, mask_block):
    """Its BlockMask, from our layout: `create_block_mask` would first make it by tokens.

    At 32,768 tokens and 32 heads that is 34 GB.
    """
    layout = BlockLayout().sees(length // BLOCK)
    ratio, number = mask_block // BLOCK, length // mask_block
    parts = layout.reshape(-1, number, ratio, number, ratio)
    seen, whole = parts.any((2, 4)), parts.all((2, 4)) & ~np.eye(number, dtype=bool)
    pattern = np.arange(heads) % len(layout)
    partial, full = (in_order(blocks[pattern]) for blocks in (seen & ~whole, whole))
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=mask_block, mask_mod=sees)


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
    mask = peer_mask(length, heads, mask_block)

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
        mine = measure("mosaic", block_sparse(shape[1]), draw(shape))
        peer = flex(shape, int(mask_block))
        cells = [f"{a * 1e3:.3f} ms, {b * 1e3:.3f} ms" for a, b in (mine, peer)]
        ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(peer, mine, strict=True))
        print(f"| {shape} | {' | '.join(cells)} | {ratios} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
