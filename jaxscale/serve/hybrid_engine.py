"""One set of parameters that trains and writes, spread as decoding wants it while it writes.

Source: Yao et al. 2023, DeepSpeed-Chat (arXiv 2308.01320), section 4.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxscale.launch.memory import check_fits
from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import Table, abstract_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_serving_operations
from jaxscale.parallel.rules import Specs, make_specs
from jaxscale.serve.decoding import generate_tokens
from jaxscale.types import InputError, Params


def specs_of_writing(
    table: Table,
    num_devices: int,
    tensor: int,
    parameter: str,
) -> tuple[MeshConfig, Specs]:
    """The mesh of devices that write, and where on it the parameters are.

    Args:
        table: of the parameters.
        num_devices: of the training.
        tensor: devices over which each copy of the model is spread.
        parameter: that gives this number, for errors.
    Raises:
        InputError: it does not divide the devices or the model, with the equation.
    """
    if num_devices % tensor:
        expected = f"devices % tensor == 0, here {num_devices} devices"
        raise InputError(parameter, tensor, expected)
    config = MeshConfig(data=num_devices // tensor, tensor=tensor)
    try:
        return config, make_specs(table, config)
    except InputError as error:
        expected = f"a number by which the model can be divided ({error})"
        raise InputError(parameter, tensor, expected) from error


class HybridEngine:
    """Decodes on all devices of a training, with the parameters that it has.

    Each group of `tensor` devices has a copy of the model and continues its share of the prompts,
    until all of these have ended. Keys and values are gone when the texts are there, and the copy
    when the caller drops it.

    Args:
        model: the model.
        policy: dtypes, as the run's.
        training: the region in which the parameters are trained.
        tensor: devices over which each copy of the model is spread.
        parameter: that gives this number, for errors.
    Raises:
        InputError: as `specs_of_writing`.
    """

    def __init__(
        self,
        model: ModelConfig,
        policy: Policy,
        training: Region,
        tensor: int,
        parameter: str,
    ):
        devices = training.mesh.devices.reshape(-1).tolist()
        table = parameter_table(model)
        config, specs = specs_of_writing(table, len(devices), tensor, parameter)
        mesh = make_mesh(config, devices)
        execution = ExecutionConfig(is_scanned=False, remat="none")
        self.decoder, self.region = Decoder(model, policy=policy, execution=execution), None
        if len(devices) > 1:
            attention = self.decoder.operations.backends.attention
            operations = make_serving_operations(config, specs, attention=attention)
            self.decoder = dataclasses.replace(self.decoder, operations=operations)
            self.region = Region(mesh, specs, operations)
        self.abstract = jax.tree.map(
            lambda leaf, spec: leaf.update(sharding=NamedSharding(mesh, spec)),
            abstract_params(table, policy.parameters),
            specs.parameters,
        )
        layout, dims = training.specs.layout, specs.dims
        self._spread = jax.jit(
            lambda params: layout.restore(params, dims),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract),
        )

    def check_room(self, owner: str) -> None:
        """Raises InputError, which names the owner, if devices cannot hold the copies alone."""
        check_fits(owner, {"parameters that write": self.abstract})

    def spread(self, params: Params) -> Params:
        """The model's among the parameters of the training, as `write` takes them."""
        return self._spread({name: params[name] for name in self.abstract})

    def write(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        **settings: Any,
    ) -> list[list[int]]:
        """The new tokens of each prompt; settings and errors as of `generate_tokens`."""
        return generate_tokens(self.decoder, params, prompts, region=self.region, **settings)
