"""A model that lies whole on one device while an evaluator has it write."""

import jax
from jax.sharding import SingleDeviceSharding

from jaxscale.launch.memory import check_fits
from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.precision import Policy


def check_room(owner: str, model: ModelConfig, policy: Policy) -> None:
    """Raises InputError, which names the owner, unless one device can hold all parameters."""
    here = SingleDeviceSharding(jax.local_devices()[0])
    params = abstract_params(parameter_table(model), policy.parameters)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), params
    )
    check_fits(owner, {"whole parameters": placed})


def whole_decoder(model: ModelConfig, policy: Policy) -> Decoder:
    """The model as `serve.decoding.generate_tokens` runs it."""
    execution = ExecutionConfig(is_scanned=False, remat="none")
    return Decoder(model, policy=policy, execution=execution)
