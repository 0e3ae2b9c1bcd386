"""The head of a pipelined model: every stage computes a share of the vocabulary's logits.

The unembedding and its loss are as much work as one layer or several. On the last stage alone they
would make it the slowest, and all stages wait for the slowest in every tick. So the last stage's
output goes to all stages, and each takes a share of the vocabulary.

Source: Yeung et al. 2024 (arXiv 2411.05288), section 4; here forward and gradient are one pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.loss import Head, num_rows
from jaxscale.parallel import tensor
from jaxscale.parallel.mesh import PIPELINE, TENSOR
from jaxscale.parallel.pipeline.loss import Sums
from jaxscale.types import Array


def token_loss(
    h: Array,
    head: Array | Head,
    labels: Array,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """`tensor.token_loss` of tokens that all stages have, by a share of the vocabulary on each.

    A vocabulary that the stages do not divide is computed whole by each of them.

    Args and Returns as `tensor.token_loss`; the results are the same on all stages.
    Cost: one all-reduce over the stages of the maxima and one of two numbers a token.
    """
    num_stages = lax.axis_size(PIPELINE)
    share, rest = divmod(num_rows(head), num_stages)
    if rest:
        return tensor.token_loss(h, head, labels, softcap)

    def of_stage(leaf: Array) -> Array:
        return lax.dynamic_slice_in_dim(leaf, lax.axis_index(PIPELINE) * share, share)

    of_head = jax.tree.map(of_stage, head)
    return tensor.token_loss(h, of_head, labels, softcap, axes=(TENSOR, PIPELINE))


def from_last_stage(tree: Any) -> Any:
    """The last stage's arrays, on every stage."""
    return lax.psum(_of_last_stage(tree), PIPELINE)


def counted_once(sums: Sums) -> Sums:
    """Sums that every stage knows, as the last one's; the others have zeros.

    All stages have the same share in the gradient. Where they computed the loss together, the sum
    over stages that they took gives each the sum of all shares.
    """
    loss, *_ = sums
    first, *others = _of_last_stage(lax.stop_gradient(sums))
    return first + _share_of_gradient(loss), *others


@jax.custom_vjp
def _share_of_gradient(loss: Array) -> Array:
    """Zero, also where the loss is not finite, with a stage's share of the loss's gradient."""
    return jnp.zeros_like(loss)


_share_of_gradient.defvjp(
    lambda loss: (_share_of_gradient(loss), None),
    lambda _, cotangent: (cotangent / lax.axis_size(PIPELINE),),
)


def _of_last_stage(tree: Any) -> Any:
    """The arrays on the last stage, zeros on the others."""
    is_last = lax.axis_index(PIPELINE) == lax.axis_size(PIPELINE) - 1
    return jax.tree.map(lambda x: jnp.where(is_last, x, jnp.zeros_like(x)), tree)
