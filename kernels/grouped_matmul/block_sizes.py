"""Block sizes by device, as measured (experiments/bench/grouped_matmul.py)."""

from jaxscale.kernels.persistent import BlockSizes

H200 = BlockSizes()  # for all kernels: none gains from others
