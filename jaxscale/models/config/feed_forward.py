"""The configuration of a dense feed-forward."""

import dataclasses

from jaxscale.ops.activation import ACTIVATIONS, is_gated
from jaxscale.types import check_choice, check_positive, check_types


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """A dense feed-forward.

    Args:
        dim: F, the width of its hidden vector.
        activation: one of `ops.activation.ACTIVATIONS`.
        use_bias: whether its projections have biases.
    """

    dim: int
    activation: str = "swiglu"
    use_bias: bool = False

    def __post_init__(self):
        check_types(self)
        check_positive("FeedForwardConfig.dim", self.dim)
        check_choice("FeedForwardConfig.activation", self.activation, ACTIVATIONS)

    @property
    def is_gated(self) -> bool:
        """Whether there is a gate matrix."""
        return is_gated(self.activation)
