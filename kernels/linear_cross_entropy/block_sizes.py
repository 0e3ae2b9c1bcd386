"""Block sizes by device, as measured (experiments/bench/linear_cross_entropy.py)."""

from jaxscale.kernels.persistent import BlockSizes

H200 = BlockSizes()
