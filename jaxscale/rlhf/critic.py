"""A critic: a second model beside the policy, whose values say what the rest of an answer earns."""

import dataclasses

import jax

from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.parameters import Parameter, Table, parameter_table
from jaxscale.models.values import token_values
from jaxscale.rlhf.log_probabilities import residual
from jaxscale.types import Array, Batch, InputError, Params, check_positive, check_types

CRITIC = "critic"  # section of the parameter tree


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """The critic of a run.

    Its parameters are the section `critic` of the policy's own tree. So one mesh shards them, one
    optimizer trains them and one checkpoint keeps them, none of which knows of a second model. They
    are a model's and no head on the policy's layers, as in DeepSpeed-Chat: a reward model, which
    may be the smaller one, already tells good answers from bad ones, and the error of values does
    not pull at the layers that write.

    Args:
        model: with a value head; as the reward model's where it begins as one.
        init_from: checkpoint directory of the reward model whose parameters a new run's critic
            starts from; None to draw them.
        learning_rate_factor: by which the run's learning rate is multiplied for the critic.
    """

    model: ModelConfig
    init_from: str | None = None
    learning_rate_factor: float = 1.0

    def __post_init__(self):
        check_types(self)
        if not self.model.use_value_head:
            raise InputError("CriticConfig.model.use_value_head", False, "True: it has values")
        if not self.model.is_causal:
            expected = "True: a value says what is to come, of which it must see nothing"
            raise InputError("CriticConfig.model.is_causal", False, expected)
        check_positive("CriticConfig.learning_rate_factor", self.learning_rate_factor)

    def table(self) -> Table:
        """The parameter table of the section."""

        def own(parameter: Parameter) -> Parameter:
            factor = parameter.learning_rate_factor * self.learning_rate_factor
            return dataclasses.replace(parameter, learning_rate_factor=factor, model=CRITIC)

        return jax.tree.map(own, parameter_table(self.model))


def critic_values(
    decoder: Decoder,
    config: ModelConfig,
    params: Params,
    batch: Batch,
) -> Array:
    """The value of each own token, [B, own T], with a gradient.

    Args:
        decoder: of the policy, bound to the mesh's operations.
        config: of the critic.
        params: the parameter tree with the section `critic`.
        batch: as for `residual`.
    """
    operations = decoder.operations
    collectives, backends = operations.collectives, operations.backends

    def gather(section: str, part: Params) -> Params:
        return collectives.gather_parameters(f"{CRITIC}/{section}", part)

    def name(path: str, x: Array) -> Array:
        return backends.name(f"{CRITIC}/{path}", x)

    operations = dataclasses.replace(
        operations,
        collectives=dataclasses.replace(collectives, gather_parameters=gather),
        backends=dataclasses.replace(backends, name=name),
    )
    critic = dataclasses.replace(decoder, config=config, operations=operations)
    own = params[CRITIC]
    return token_values(critic, own, residual(critic, own, batch))
