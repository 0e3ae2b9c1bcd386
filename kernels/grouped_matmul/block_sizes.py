"""Block sizes by device, as measured (experiments/bench/grouped_matmul.py)."""

from jaxscale.kernels.persistent import BlockSizes

H200 = BlockSizes()  # for all kernels: none gains from others
# For few rows.
NARROW = (BlockSizes(columns=128, stages=4), BlockSizes(columns=64, stages=6))
# For results in float32, which take twice the shared memory.
WIDE_RESULTS = BlockSizes(columns=128)
