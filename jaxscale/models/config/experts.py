"""The configuration of a mixture of experts and of its router, which is one of several classes."""

import dataclasses

from jaxscale.ops.activation import ACTIVATIONS, is_gated
from jaxscale.types import (
    InputError,
    check_choice,
    check_not_negative,
    check_positive,
    check_types,
)

FORMS = ("paper", "released")
VERSIONS = ("v1", "v2", "v2_star")


@dataclasses.dataclass(frozen=True)
class TopKRouter:
    """The most probable experts, with their probabilities as gates.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 2.2; one expert, Fedus et al. 2021
        (arXiv 2101.03961), equation 2; without capacity, so that no token is dropped.
    Args:
        is_renormalised: whether the gates of the chosen experts are divided by their sum. A single
            expert's gate stays its probability, for a gate of 1 would give the router no gradient.
    """

    is_renormalised: bool = True

    def __post_init__(self):
        check_types(self)


@dataclasses.dataclass(frozen=True)
class DenseMixerRouter:
    """`TopKRouter` whose router learns in training from the outputs of all experts.

    Source: Yao et al. 2025, DenseMixer (github.com/yaof20/DenseMixer).
    """


@dataclasses.dataclass(frozen=True)
class MaskedSamplingRouter:
    """Experts drawn in training as SparseMixer-v2 draws them, with the gates of `TopKRouter`.

    Source: Liu et al. 2024 (arXiv 2409.12136), appendix A.4.
    Args:
        threshold: r of its equation 2, by which the logit of an expert that may be drawn may fall
            short of the largest.
        mask: "paper", that equation, or "released", the form of its code and of Hugging Face's
            PhiMoE.
    """

    threshold: float = 0.01
    mask: str = "paper"

    def __post_init__(self):
        check_types(self)
        check_not_negative(f"{type(self).__name__}.threshold", self.threshold)
        check_choice(f"{type(self).__name__}.mask", self.mask, FORMS)


@dataclasses.dataclass(frozen=True)
class SparseMixerRouter(MaskedSamplingRouter):
    """Experts drawn in training, with a gradient of the router through the draw.

    Source: version "v1", Liu et al. 2023 (arXiv 2310.00811), for one expert a token; "v2" and
        "v2_star", Liu et al. 2024 (arXiv 2409.12136), algorithms 1 and 2.
    Args:
        threshold: as in `MaskedSamplingRouter`.
        mask: as in `MaskedSamplingRouter`.
        version: one of VERSIONS.
        expert_gradient: "paper" or "released", see `models.sparsemixer.sparsemixer`.
    """

    version: str = "v2"
    expert_gradient: str = "paper"

    def __post_init__(self):
        super().__post_init__()
        check_choice("SparseMixerRouter.version", self.version, VERSIONS)
        check_choice("SparseMixerRouter.expert_gradient", self.expert_gradient, FORMS)


Router = TopKRouter | DenseMixerRouter | MaskedSamplingRouter | SparseMixerRouter


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture-of-experts feed-forward; experts and routers have no biases.

    Args:
        num_experts: E.
        dim: F of one expert.
        num_active: A, experts that each token visits.
        activation: one of `ops.activation.ACTIVATIONS`.
        router: how experts are chosen and how the choice is differentiated.
        balance_loss: weight of the load-balance loss (arXiv 2101.03961, equation 4). Its shares are
            of one layer and of a micro-batch's tokens on all devices.
        z_loss: weight of the router's z-loss (arXiv 2202.08906, equation 5).
        shared_dim: F of a gated expert that every token visits beside those of its router, weighted
            by a sigmoid of the token (arXiv 2407.10671, section 2.2.2, and its released code); 0
            for no such expert.
        dropout: probability with which an element of an expert's hidden vector is dropped in
            training (arXiv 2101.03961, section 4).
    """

    num_experts: int
    dim: int
    num_active: int = 2
    activation: str = "swiglu"
    router: Router = TopKRouter()
    balance_loss: float = 0.01
    z_loss: float = 0.0
    dropout: float = 0.0
    shared_dim: int = 0

    def __post_init__(self):
        check_types(self)
        check_not_negative("ExpertsConfig.shared_dim", self.shared_dim)
        if self.shared_dim and not self.is_gated:
            expected = "0 with an activation that is not gated"
            raise InputError("ExpertsConfig.shared_dim", self.shared_dim, expected)
        check_positive("ExpertsConfig.num_experts", self.num_experts)
        check_positive("ExpertsConfig.dim", self.dim)
        check_choice("ExpertsConfig.activation", self.activation, ACTIVATIONS)
        for name in ("balance_loss", "z_loss"):
            check_not_negative(f"ExpertsConfig.{name}", getattr(self, name))
        if not 0 <= self.dropout < 1:
            raise InputError("ExpertsConfig.dropout", self.dropout, "0 or a probability below 1")
        if not 1 <= self.num_active <= self.num_experts:
            expected = f"1 to num_experts = {self.num_experts}"
            raise InputError("ExpertsConfig.num_active", self.num_active, expected)
        is_v1 = isinstance(self.router, SparseMixerRouter) and self.router.version == "v1"
        if is_v1 and self.num_active > 1:
            expected = '1 with SparseMixerRouter.version = "v1", defined for one expert a token'
            raise InputError("ExpertsConfig.num_active", self.num_active, expected)

    @property
    def is_gated(self) -> bool:
        """Whether experts have a gate matrix."""
        return is_gated(self.activation)

    @property
    def has_output_scale(self) -> bool:
        """Whether a learned vector scales the output, as in SparseMixer v1 (arXiv 2310.00811)."""
        return isinstance(self.router, SparseMixerRouter) and self.router.version == "v1"
