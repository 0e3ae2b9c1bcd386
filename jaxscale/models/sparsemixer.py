"""SparseMixer: experts drawn from a masked softmax, and the router's gradient through the draw.

For h = p_D E_D(x) of the drawn expert D the layer returns c h, where c is 1 or a smaller number
that is drawn too: the loss's slope at c h, times dh/dz, is in expectation a quadrature of f(h) -
f(0), the draw's share of the loss. What f is differentiated at is the forward's affair (c), how
much of it counts the backward's (`Estimator.slope`).

Source: Liu et al. 2023 (arXiv 2310.00811); Liu et al. 2024 (arXiv 2409.12136), section 2 and its
    appendix A.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.models.config import ModelConfig
from jaxscale.ops.draws import ROUTER, Draws
from jaxscale.types import Array


@dataclasses.dataclass(frozen=True)
class Estimator:
    """The constants of one variant; an expert that is the most probable always has c = 1 (Euler's rule).

    Args:
        temperature: p = softmax(z / temperature) over the kept experts.
        chance: of c = 1 for another expert.
        fraction: its c else.
        slope: by which the gradient of p_D is multiplied.
    """

    temperature: float
    chance: float
    fraction: float
    slope: float


# The objective of v1 and v2* keeps p inside f: sum_D p_D f(p_D E_D), whose gradient is that of p
# outside, a quadrature of f(h) - f(0), plus f'(h) dh. The midpoint rule gives f'(h/2) + f'(h) = 2
# (1/2 f'(h/2) + 1/2 f'(h)), Heun's third order 1/4 f'(h) + 3/4 f'(h/3) + f'(h) = 2 (5/8 f'(h) + 3/8
# f'(h/3)). v2's has p inside f detached: the quadrature alone. Each is confirmed by finite
# differences in the tests.
ESTIMATORS = {
    "sparsemixer": Estimator(temperature=1, chance=1 / 2, fraction=1 / 2, slope=2),
    "sparsemixer_v2": Estimator(temperature=1, chance=1 / 4, fraction=1 / 3, slope=1),
    "sparsemixer_v2_star": Estimator(temperature=2, chance=5 / 8, fraction=1 / 3, slope=2),
}


class Selection(NamedTuple):
    """One draw of each token.

    Args:
        index: [B, T] the expert.
        p: [B, T, E] the masked softmax it was drawn from, 0 for experts that could not be.
    """

    index: Array
    p: Array


def kept(z: Array, available: Array, *, threshold: float, form: str) -> Array:
    """Which experts may be drawn: those whose logit is near the largest, z*, of the available ones; that one always is.

    "paper": z* - z_i <= r (|z_i| + |z*|). "released", the authors' code: z* - z_i <= 2 r max(|z_i|, z*), with the sign
    of z*; the two are the same where |z_i| = |z*|. Equal logits are all kept.

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


def select(
    z: Array, available: Array, uniform: Array | None, config: ModelConfig, temperature: float
) -> Selection:
    """Draws one of the kept experts by their masked softmax; without `uniform`, takes the most probable one.

    Of several with the largest logit the first is the most probable one.

    Args:
        z: [B, T, E] logits, not differentiated here.
        available: [B, T, E] bool.
        uniform: [B, T, E] numbers above 0 and below 1.
    """
    keep = kept(z, available, threshold=config.router_threshold, form=config.router_mask)
    masked = jnp.where(keep, z / temperature, -jnp.inf)
    noisy = masked if uniform is None else masked - jnp.log(-jnp.log(uniform))  # Gumbel-max
    return Selection(jnp.argmax(noisy, -1), jax.nn.softmax(masked))


def select_all(
    z: Array, numbers: Array | None, config: ModelConfig, temperature: float = 1
) -> list[Selection]:
    """A draws one after the other, each without the experts drawn before, whose mask is made anew.

    Args:
        z: [B, T, E] logits.
        numbers: as `numbers_of`; None takes the most probable expert each time.
    """
    z, available, found = jax.lax.stop_gradient(z), jnp.ones(z.shape, bool), []
    for number in range(config.num_active_experts):
        uniform = None if numbers is None else numbers[..., number, :-1]
        found.append(select(z, available, uniform, config, temperature))
        available = available & ~jax.nn.one_hot(found[-1].index, config.num_experts, dtype=bool)
    return found


def numbers_of(draws: Draws, config: ModelConfig) -> Array:
    """For each of the A draws a number an expert, and one for c: [B, T, A, E + 1], above 0 and below 1."""
    shape = config.num_active_experts, config.num_experts + 1
    return draws.numbers(ROUTER, shape[0] * shape[1]).reshape(*draws.keys.shape[:-1], *shape)


class Mixture(NamedTuple):
    """What a token does with its experts, [B, T, A] each.

    Args:
        index: the experts.
        gates: their multipliers.
        slopes: what an expert's gradient is multiplied by instead; None for the gates.
        is_chosen: false for an expert that runs for its router's gradient alone; None where there
            is none.
    """

    index: Array
    gates: Array
    slopes: Array | None = None
    is_chosen: Array | None = None


def sparsemixer(z: Array, draws: Draws | None, config: ModelConfig) -> Mixture:
    """SparseMixer v1, v2 or v2*, whichever `config.router` names; without draws the argmax and ordinary gates p_D.

    The authors differ from themselves in what an expert's gradient is multiplied by. "paper",
    algorithm 1 and 2: y = s h + stop_gradient(c h - s h) gives s p_D with the estimator's slope s;
    "released", their code: c p_D. The multipliers of two experts are not normalised to sum to 1.

    Source: arXiv 2409.12136, algorithm 1 (v2), algorithm 2 (v2*); arXiv 2310.00811, section 3 (v1).
    Args:
        z: [B, T, E] logits in at least float32.
        draws: of these tokens in training.
    """
    estimator = ESTIMATORS[config.router]
    numbers = None if draws is None else numbers_of(draws, config)
    found = select_all(z, numbers, config, estimator.temperature)
    index = jnp.stack([selection.index for selection in found], -1)
    slope = 1.0 if numbers is None else estimator.slope
    gates = []
    for number, selection in enumerate(found):
        c = jnp.ones_like(z[..., 0])
        if numbers is not None:
            is_most = selection.index == jnp.argmax(selection.p, -1)
            is_euler = is_most | (numbers[..., number, -1] < estimator.chance)
            c = jnp.where(is_euler, c, estimator.fraction)
        gates.append(
            multiplier(z, selection, c, jnp.asarray(slope / estimator.temperature, z.dtype))
        )
    if numbers is None or config.router_expert_gradient == "released":
        return Mixture(index, jnp.stack(gates, -1))
    return Mixture(
        index,
        jnp.stack(gates, -1),
        slope * jnp.stack([_taken(selection) for selection in found], -1),
    )


@jax.custom_vjp
def multiplier(z: Array, selection: Selection, c: Array, slope: Array) -> Array:
    """c p_D, whose gradient to z is slope p_D (1[D] - p) without c; nothing else has one.

    Source: arXiv 2409.12136, equation 8.
    Args:
        z: [B, T, E] logits.
        selection: D and p, made of them.
        c: [B, T].
        slope: [].
    """
    return c * _taken(selection)


def _multiplier_backward(arguments: tuple[Selection, Array], cotangent: Array) -> tuple:
    selection, slope = arguments
    drawn = jax.nn.one_hot(selection.index, selection.p.shape[-1], dtype=selection.p.dtype)
    weight = slope * cotangent * _taken(selection)
    return weight[..., None] * (drawn - selection.p), None, None, None


multiplier.defvjp(
    lambda z, selection, c, slope: (multiplier(z, selection, c, slope), (selection, slope)),
    _multiplier_backward,
)


def _taken(selection: Selection) -> Array:
    """p_D [B, T]."""
    return jnp.take_along_axis(selection.p, selection.index[..., None], -1)[..., 0]
