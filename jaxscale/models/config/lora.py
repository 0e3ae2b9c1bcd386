"""The configuration of low-rank adapters."""

import dataclasses

from jaxscale.types import InputError, check_choice, check_positive, check_types

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside the matrices of attention and dense feed-forwards.

    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), section 4.1: W + (alpha / r) B A.
    Args:
        rank: r.
        alpha: the sum of the two products is multiplied by alpha / r.
        targets: which matrices have adapters, of TARGETS; experts have none.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        check_types(self)
        check_positive("LoraConfig.rank", self.rank)
        check_positive("LoraConfig.alpha", self.alpha)
        if not self.targets:
            raise InputError("LoraConfig.targets", self.targets, "at least one matrix")
        for target in self.targets:
            check_choice("LoraConfig.targets", target, TARGETS)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank
