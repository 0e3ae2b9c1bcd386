"""Block sizes by device, as measured (experiments/bench/grouped_matmul.py)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How a kernel cuts the output.

    Args:
        columns: of the output that a block computes at a time.
        stages: steps of the contraction whose operands are in shared memory.
        minor: dim along which consecutive blocks lie, 0 rows or 1 columns.
        snake: blocks along that dim before the other advances; what they read together stays in the L2 cache.
    """

    columns: int = 256
    stages: int = 3
    minor: int = 0
    snake: int = 8


H200 = {"forward": BlockSizes(), "input_gradient": BlockSizes(), "weight_gradient": BlockSizes()}
