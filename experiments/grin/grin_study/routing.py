"""Where the text of each domain is routed, and how alike the loads of two domains are."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from jaxscale.models.evaluation import EvaluationContext
from jaxscale.types import Batch, InputError


@dataclasses.dataclass(frozen=True)
class DomainSums:
    """Sums over the held-out text of one domain.

    Args:
        nll: negative log-likelihood of the predicted tokens, in nats.
        tokens: number of predicted tokens.
        load: float64 [MoE layers, E], how many choices fell on each expert; None for a dense model.
    """

    nll: float
    tokens: float
    load: np.ndarray | None


def domain_sums(
    context: EvaluationContext, domains: Mapping[str, Iterable[Batch]]
) -> dict[str, DomainSums]:
    """Run a model over the text of each domain.

    Args:
        context: the model in training; see `models.evaluation`.
        domains: name -> this host's batches, such as a `HeldOutLoader` of one source.
    """
    return {name: _sums(context, batches) for name, batches in domains.items()}


def _sums(context: EvaluationContext, batches: Iterable[Batch]) -> DomainSums:
    key = jax.random.key(0)
    # Dispatch all batches before reading a result, so that the device never waits for the host.
    results = []
    for batch in batches:
        placed = context.place(batch)
        results.append(context.sums(context.params, placed, key))
    nll, tokens, load = 0, 0, None
    for _, weight, metrics in results:
        nll += float(metrics["nll"])
        tokens += float(weight)
        if "load" in metrics:
            of_batch = np.asarray(metrics["load"], np.float64)
            load = of_batch if load is None else load + of_batch
    return DomainSums(nll, tokens, load)


def shares(load: np.ndarray) -> np.ndarray:
    """Each expert's share of its layer's choices.

    Args:
        load: [..., E] choices.
    Returns:
        [..., E], which sums to 1 over E.
    Raises:
        InputError: a layer has no choices.
    """
    load = np.asarray(load, np.float64)
    totals = load.sum(-1, keepdims=True)
    if (totals == 0).any():
        raise InputError("load", "a layer without choices", "at least one choice in each layer")
    return load / totals


def similarity(loads: Mapping[str, np.ndarray]) -> np.ndarray:
    """Cosine between the loads of every two domains; 1 if they use the experts in one proportion.

    Source: Liu et al. 2024 (arXiv 2409.12136), section 5, compares tasks in this way.
    Args:
        loads: domain -> [MoE layers, E] choices, at least one in each layer.
    Returns:
        [MoE layers, domains, domains].
    """
    by_domain = [shares(load) for load in loads.values()]
    stacked = np.stack(by_domain, axis=1)
    norms = np.linalg.norm(stacked, axis=-1, keepdims=True)
    directions = stacked / norms
    return directions @ directions.swapaxes(1, 2)
