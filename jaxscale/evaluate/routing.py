"""Where the text of each domain is routed: held-out loss and experts' loads by domain, and how alike the loads are."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from jaxscale.train.evaluation import EvaluationContext
from jaxscale.types import Batch, InputError


@dataclasses.dataclass(frozen=True)
class DomainSums:
    """Sums over the held-out text of one domain.

    Args:
        nll: nats.
        tokens: predicted tokens.
        load: float64 [MoE layers, E] choices that fell on each expert; None for a dense model.
    """

    nll: float
    tokens: float
    load: np.ndarray | None


def domain_sums(
    context: EvaluationContext, domains: Mapping[str, Iterable[Batch]]
) -> dict[str, DomainSums]:
    """Runs a model over the text of each domain.

    Args:
        context: the model in training; see `train.evaluation`.
        domains: name -> this host's batches, such as a `HeldOutLoader` of one source.
    """
    return {name: _sums(context, batches) for name, batches in domains.items()}


def _sums(context: EvaluationContext, batches: Iterable[Batch]) -> DomainSums:
    key = jax.random.key(0)
    results = [context.sums(context.params, context.place(batch), key) for batch in batches]
    loads = [
        np.asarray(metrics["load"], np.float64) for _, _, metrics in results if "load" in metrics
    ]
    return DomainSums(
        nll=sum(float(metrics["nll"]) for _, _, metrics in results),
        tokens=sum(float(weight) for _, weight, _ in results),
        load=sum(loads) if loads else None,
    )


def shares(load: np.ndarray) -> np.ndarray:
    """Each expert's share of a layer's choices: [..., E] to [..., E], sums of 1 over E."""
    totals = np.asarray(load, np.float64).sum(-1, keepdims=True)
    if (totals == 0).any():
        raise InputError("load", "a layer without choices", "at least one choice in each layer")
    return load / totals


def similarity(loads: Mapping[str, np.ndarray]) -> np.ndarray:
    """Cosine between the loads of every two domains: 1, they use the experts in the same proportions.

    Source: Liu et al. 2024 (arXiv 2409.12136), section 5, compares tasks so.
    Args:
        loads: domain -> [MoE layers, E] choices, at least one in each layer.
    Returns:
        [MoE layers, domains, domains].
    """
    stacked = np.stack([shares(load) for load in loads.values()], 1)
    stacked /= np.linalg.norm(stacked, axis=-1, keepdims=True)
    return stacked @ stacked.swapaxes(1, 2)


def routing_table(loads: Mapping[str, np.ndarray], layer: int) -> str:
    """Markdown: a row a domain, a column an expert, shares of the domain's choices in one layer."""
    num_experts = len(next(iter(loads.values()))[layer])
    rows = [
        f"| domain | {' | '.join(map(str, range(num_experts)))} |",
        "|---" * (num_experts + 1) + "|",
    ]
    for name, load in loads.items():
        rows.append(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares(load[layer]))} |")
    return "\n".join(rows)
