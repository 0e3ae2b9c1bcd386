"""What PPO learns from: answers, how probable they were, and how much better than expected."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.parallel.batch import place
from jaxscale.parallel.mesh import BATCH_SPEC
from jaxscale.parallel.region import Region
from jaxscale.rlhf.ppo import PpoLoss
from jaxscale.types import Array, Batch, Params

Experience = Callable[[Params, Batch, np.ndarray], tuple[Batch, dict[str, float]]]


def make_experience(loss: PpoLoss, region: Region) -> Experience:
    """(parameters, answers on the host, their rewards) -> (what `PpoLoss` takes, figures).

    A token's reward is -kl_penalty (log p - log p of the reference), to which the last one of an
    answer adds the answer's, clipped. (DeepSpeed-Chat adds it one token later where a row has room
    for that, to a token that is in no loss.) An answer that was cut off ends where it was cut.

    The figure: "kl", the divergence from the reference, q / p - log(q / p) - 1 a token.
    """
    rows = NamedSharding(region.mesh, BATCH_SPEC)
    alike = NamedSharding(region.mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=(rows, alike))
    def judged(params: Params, batch: Batch, scores: Array) -> tuple[Batch, dict[str, Array]]:
        found = region.rows(loss.before)(params, batch)
        weights, log_p, values = batch["weights"], found["log_p"], found["values"]
        log_ratio = found.get("reference", log_p) - log_p
        rewards = jnp.clip(scores, -loss.score_clip, loss.score_clip)
        rewards += loss.kl_penalty * log_ratio
        gained = advantages(rewards, values, weights, gamma=loss.gamma, gae_lambda=loss.gae_lambda)
        ready = {"log_p": log_p, "values": values, "advantages": gained}
        if not loss.kl_penalty:
            return ready, {}
        kl = (jnp.expm1(log_ratio) - log_ratio) * weights
        return ready, {"kl": kl.sum() / weights.sum()}

    def experience(
        params: Params,
        batch: Batch,
        rewards: np.ndarray,
    ) -> tuple[Batch, dict[str, float]]:
        scores = _at_the_end(rewards.reshape(-1), batch["weights"])
        placed = place(region.mesh, batch | {"scores": scores})
        scores = placed.pop("scores")
        found, figures = judged(params, placed, scores)
        return placed | found, {name: float(figure) for name, figure in figures.items()}

    return experience


def _at_the_end(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[B, T] the reward of each row's answer at its last token, 0 elsewhere."""
    num_rows, length = weights.shape
    from_the_end = np.argmax(weights[:, ::-1], axis=1)
    scores = np.zeros_like(weights)
    scores[np.arange(num_rows), length - 1 - from_the_end] = rewards
    return scores


def advantages(
    rewards: Array,
    values: Array,
    weights: Array,
    *,
    gamma: float,
    gae_lambda: float,
) -> Array:
    """How much more an answer earns from a token on than had been expected there.

    With d_t = r_t + gamma V_{t + 1} - V_t, the sum over k of (gamma lambda)^k d_{t + k}; nothing
    comes after an answer's last token.

    Source: Schulman et al. 2015 (arXiv 1506.02438), equation 16.
    Args:
        rewards: [B, T] of each token.
        values: [B, T] of what is to come before each token is drawn.
        weights: [B, T] not 0 at the tokens of answers, of which each row has one.
        gamma: discount.
        gae_lambda: between 0, one step of V, and 1, the whole sum of rewards.
    Returns:
        [B, T]; 0 at all other tokens.
    """

    def before(later: tuple[Array, Array], now: tuple[Array, ...]):
        advantage, value = later
        reward, own_value, weight = now
        error = reward + gamma * value - own_value
        advantage = jnp.where(weight == 0, 0, error + gamma * gae_lambda * advantage)
        return (advantage, jnp.where(weight == 0, 0, own_value)), advantage

    nothing = jnp.zeros_like(values[:, 0])
    by_token = rewards.T, values.T, weights.T
    _, found = lax.scan(before, (nothing, nothing), by_token, reverse=True)
    return found.T
