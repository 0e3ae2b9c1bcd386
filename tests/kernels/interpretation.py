"""How the tests run the kernels: compiled on a Hopper GPU (with JAX_PLATFORMS=cuda), elsewhere interpreted."""

import jax
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,  # jax 0.10 does not export it
)

from jaxscale.ops.device import is_hopper

INTERPRET = False if is_hopper() else InterpretGPUParams()
KNOWS_THE_END = jax.__version_info__ >= (0, 11)
OLD_REASON = "jax 0.10 cannot interpret copies past the end, which the hardware fills with zeros"
