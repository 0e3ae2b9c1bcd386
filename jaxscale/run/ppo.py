"""PPO of a run: the third step of DeepSpeed-Chat."""

from jaxscale.parallel.region import LossFn
from jaxscale.rlhf.critic import CRITIC
from jaxscale.rlhf.ppo import PpoLoss
from jaxscale.run.run import Run, check_reference, check_rollouts, trained_paths
from jaxscale.types import InputError


def ppo_loss(
    run: Run,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    kl_penalty: float = 0.1,
    score_clip: float = 5.0,
    ratio_clip: float = 0.2,
    value_clip: float = 0.2,
    num_epochs: int = 1,
) -> LossFn:
    """The loss of answers that the model wrote, by a critic, see `rlhf.ppo.PpoLoss`.

    Args:
        run: whose model learns from `rollouts`, beside its `critic`.
        gamma: discount of a reward that comes a token later.
        gae_lambda: lambda of generalised advantage estimation.
        kl_penalty: price of the divergence from the reference; 0 asks for no reference and no
            adapters.
        score_clip: the largest reward of an answer, and the smallest when negative.
        ratio_clip: how far a token's probability may move from its old one with a gain.
        value_clip: how far a value may move from its old one with a gain.
        num_epochs: updates by the answers of one step.
    """
    check_rollouts(run, "ppo_loss")
    if run.critic is None:
        raise InputError("Run.critic", None, "CriticConfig(...) for ppo_loss")
    loss = PpoLoss(
        model=run.model,
        policy=run.policy,
        execution=run.execution,
        critic=run.critic.model,
        gamma=gamma,
        gae_lambda=gae_lambda,
        kl_penalty=kl_penalty,
        score_clip=score_clip,
        ratio_clip=ratio_clip,
        value_clip=value_clip,
        num_epochs=num_epochs,
    )
    if not any(path.startswith(f"{CRITIC}/") for path in trained_paths(run)):
        expected = f"a pattern that also matches '{CRITIC}/.*', which learns values in ppo_loss"
        raise InputError("TrainConfig.trainable", run.train.trainable, expected)
    if kl_penalty:
        check_reference(run, "ppo_loss with kl_penalty above 0")
    return loss
