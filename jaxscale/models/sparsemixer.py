"""SparseMixer: experts drawn from a masked softmax, and the router's gradient through the draw.

A router with logits z draws expert D, whose weighted output is h = p_D E_D(x). The layer returns
c h, where c is 1 or a smaller number, which is drawn too. Let f be the loss as a function of the
layer's output. What the draw adds to the loss is f(h) - f(0), the integral of f' from 0 to h. The
backward has f' at c h alone, so c is the point of a quadrature: in expectation, f'(c h) h times a
weight approximates that integral. The forward chooses the point c, and the backward the weight
(`Estimator.slope`).

Source: Liu et al. 2023 (arXiv 2310.00811); Liu et al. 2024 (arXiv 2409.12136), section 2 and its
    appendix A.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.models.config import ExpertsConfig
from jaxscale.ops.draws import ROUTER, Draws
from jaxscale.types import Array


@dataclasses.dataclass(frozen=True)
class Estimator:
    """The constants of one version; the most probable expert always has c = 1 (Euler's rule).

    Args:
        temperature: p = softmax(z / temperature) over the experts that may be drawn.
        probability: probability that c = 1 when another expert than the most probable was drawn.
        fraction: c otherwise.
        slope: factor on the gradient of p_D.
    """

    temperature: float
    probability: float
    fraction: float
    slope: float


# The objective of v1 and v2* keeps p inside f: sum_D p_D f(p_D E_D). Its gradient is that of p
# outside, a quadrature of f(h) - f(0), plus f'(h) dh. With the midpoint rule that is
# f'(h/2) + f'(h) = 2 (1/2 f'(h/2) + 1/2 f'(h)); with Heun's third-order rule it is
# 1/4 f'(h) + 3/4 f'(h/3) + f'(h) = 2 (5/8 f'(h) + 3/8 f'(h/3)). The objective of v2 detaches p
# inside f, which leaves the quadrature alone. Finite differences confirm each in the tests.
ESTIMATORS = {
    "v1": Estimator(temperature=1, probability=1 / 2, fraction=1 / 2, slope=2),
    "v2": Estimator(temperature=1, probability=1 / 4, fraction=1 / 3, slope=1),
    "v2_star": Estimator(temperature=2, probability=5 / 8, fraction=1 / 3, slope=2),
}


class Routing(NamedTuple):
    """What each token does with its experts, [B, T, A] each.

    Args:
        index: the experts.
        gates: the multipliers of their outputs.
        slopes: what an expert's gradient is multiplied by instead; None for the gates.
        is_chosen: false for an expert that runs for its router's gradient alone; None for none.
    """

    index: Array
    gates: Array
    slopes: Array | None = None
    is_chosen: Array | None = None


class Selection(NamedTuple):
    """One draw of each token.

    Args:
        index: [B, T] the expert.
        p: [B, T, E] the masked softmax it was drawn from, 0 for experts that could not be.
    """

    index: Array
    p: Array


def may_be_drawn(
    z: Array,
    available: Array,
    *,
    threshold: float,
    form: str,
) -> Array:
    """Which of the available experts have a logit near the largest, z*; the largest always is.

    "paper": z* - z_i <= r (|z_i| + |z*|). "released", the authors' code: z* - z_i <= 2 r max(|z_i|,
    z*), with the sign of z*; the two are the same where |z_i| = |z*|. Equal logits all qualify.

    Source: arXiv 2409.12136, equation 2; its released code differs as said.
    Args:
        z: [B, T, E] logits.
        available: [B, T, E] bool, false for experts drawn before.
        threshold: r.
        form: "paper" or "released".
    """
    top = jnp.where(available, z, -jnp.inf).max(-1, keepdims=True)
    if form == "paper":
        limit = threshold * (jnp.abs(z) + jnp.abs(top))
    else:
        limit = 2 * threshold * jnp.maximum(jnp.abs(z), top)
    return available & (top - z <= limit)


def draw_expert(
    z: Array,
    available: Array,
    uniform: Array | None,
    config: ExpertsConfig,
    temperature: float,
) -> Selection:
    """Draws an expert by the masked softmax; without `uniform`, takes the most probable one.

    Of several with the largest logit the first counts as the most probable.

    Args:
        z: [B, T, E] logits, not differentiated here.
        available: [B, T, E] bool.
        uniform: [B, T, E] numbers above 0 and below 1.
        config: of the mixture; its router has a threshold and a mask.
        temperature: of the softmax.
    """
    router = config.router
    keep = may_be_drawn(z, available, threshold=router.threshold, form=router.mask)
    masked = jnp.where(keep, z / temperature, -jnp.inf)
    noisy = masked
    if uniform is not None:
        noisy = masked - jnp.log(-jnp.log(uniform))  # the Gumbel-max trick
    return Selection(jnp.argmax(noisy, -1), jax.nn.softmax(masked))


def draw_experts(
    z: Array,
    numbers: Array | None,
    config: ExpertsConfig,
    temperature: float = 1,
) -> list[Selection]:
    """Draws A experts one after the other; each mask is made anew, without the experts before.

    Args:
        z: [B, T, E] logits.
        numbers: as `random_numbers`; None takes the most probable expert each time.
        config: of the mixture.
        temperature: of the softmax.
    """
    z = jax.lax.stop_gradient(z)
    available, found = jnp.ones(z.shape, bool), []
    for number in range(config.num_active):
        uniform = None if numbers is None else numbers[..., number, :-1]
        selection = draw_expert(z, available, uniform, config, temperature)
        is_drawn = jax.nn.one_hot(selection.index, config.num_experts, dtype=bool)
        available = available & ~is_drawn
        found.append(selection)
    return found


def random_numbers(draws: Draws, config: ExpertsConfig) -> Array:
    """For each of the A draws a number an expert, and one for c.

    Returns:
        [B, T, A, E + 1], above 0 and below 1.
    """
    shape = config.num_active, config.num_experts + 1
    numbers = draws.numbers(ROUTER, shape[0] * shape[1])
    return numbers.reshape(*draws.keys.shape[:-1], *shape)


def sparsemixer(
    z: Array,
    draws: Draws | None,
    config: ExpertsConfig,
) -> Routing:
    """SparseMixer v1, v2 or v2*; without draws the most probable experts and ordinary gates p_D.

    The authors differ from themselves in what an expert's gradient is multiplied by. "paper",
    algorithm 1 and 2: y = s h + stop_gradient(c h - s h) gives s p_D with the estimator's slope s;
    "released", their code: c p_D. The multipliers of two experts are not normalised to sum to 1.

    Source: arXiv 2409.12136, algorithm 1 (v2), algorithm 2 (v2*); arXiv 2310.00811, section 3 (v1).
    Args:
        z: [B, T, E] logits in at least float32.
        draws: of these tokens in training.
        config: of the mixture; its router is a SparseMixerRouter.
    """
    estimator = ESTIMATORS[config.router.version]
    numbers = None if draws is None else random_numbers(draws, config)
    found = draw_experts(z, numbers, config, estimator.temperature)
    slope = 1.0 if numbers is None else estimator.slope
    gates = []
    for number, selection in enumerate(found):
        c = jnp.ones_like(z[..., 0])
        if numbers is not None:
            c = _draw_c(selection, numbers[..., number, -1], estimator)
        gradient_factor = jnp.asarray(slope / estimator.temperature, z.dtype)
        gates.append(multiplier(z, selection, c, gradient_factor))
    index = jnp.stack([selection.index for selection in found], -1)
    if numbers is None or config.router.expert_gradient == "released":
        return Routing(index, jnp.stack(gates, -1))
    slopes = slope * jnp.stack([_probability(selection) for selection in found], -1)
    return Routing(index, jnp.stack(gates, -1), slopes)


def _draw_c(
    selection: Selection,
    uniform: Array,
    estimator: Estimator,
) -> Array:
    """c [B, T], given numbers [B, T] above 0 and below 1."""
    is_most_probable = selection.index == jnp.argmax(selection.p, -1)
    is_one = is_most_probable | (uniform < estimator.probability)
    return jnp.where(is_one, jnp.ones_like(selection.p[..., 0]), estimator.fraction)


@jax.custom_vjp
def multiplier(
    z: Array,
    selection: Selection,
    c: Array,
    slope: Array,
) -> Array:
    """c p_D, whose gradient to z is slope p_D (1[D] - p) without c; nothing else has one.

    Source: arXiv 2409.12136, equation 8.
    Args:
        z: [B, T, E] logits.
        selection: D and p, made of them.
        c: [B, T].
        slope: [].
    """
    return c * _probability(selection)


def _multiplier_forward(
    z: Array,
    selection: Selection,
    c: Array,
    slope: Array,
) -> tuple:
    return multiplier(z, selection, c, slope), (selection, slope)


def _multiplier_backward(kept: tuple[Selection, Array], cotangent: Array) -> tuple:
    selection, slope = kept
    num_experts = selection.p.shape[-1]
    drawn = jax.nn.one_hot(selection.index, num_experts, dtype=selection.p.dtype)
    weight = slope * cotangent * _probability(selection)
    return weight[..., None] * (drawn - selection.p), None, None, None


multiplier.defvjp(_multiplier_forward, _multiplier_backward)


def _probability(selection: Selection) -> Array:
    """p_D [B, T]."""
    return jnp.take_along_axis(selection.p, selection.index[..., None], -1)[..., 0]
