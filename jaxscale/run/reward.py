"""Reward models of a run: what they learn by, and `score`, what they say of texts."""

from jaxscale.parallel.region import LossFn
from jaxscale.rlhf.reward import RewardLoss
from jaxscale.run.run import Run, check_pairs


def reward_loss(
    run: Run,
    *,
    compared: str = "each_token",
    centering: float = 0.0,
) -> LossFn:
    """The loss of a reward model, see `rlhf.reward.RewardLoss`.

    Args:
        run: whose model, which has a value head, learns from pairs of `PreferenceSource`.
        compared: "each_token" from the first in which the answers differ, or "last_token" of each.
        centering: weight of the square of the sum of both scores.
    """
    check_pairs(run, "reward_loss")
    return RewardLoss(
        model=run.model,
        policy=run.policy,
        execution=run.execution,
        compared=compared,
        centering=centering,
    )
