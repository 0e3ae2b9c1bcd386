"""How often the answer that was preferred is the one that a model came to prefer."""

import collections
import dataclasses

import jax

from jaxscale.data.loader import DataConfig
from jaxscale.evaluate.perplexity import held_out
from jaxscale.models.evaluation import EvaluationContext
from jaxscale.parallel.batch import batch_share
from jaxscale.types import InputError, check_types


@dataclasses.dataclass(frozen=True)
class PreferenceAccuracy:
    """Evaluator that goes once over the held-out pairs of a run by `dpo_loss` or `reward_loss`.

    Args:
        data: as the run's.
    """

    data: DataConfig

    def __post_init__(self):
        check_types(self)
        if not self.data.is_paired:
            expected = "pairs of PreferenceSource"
            raise InputError("PreferenceAccuracy.data", self.data.sources, expected)
        if self.data.held_out_fraction == 0:
            expected = "above 0: no pair is held out to be evaluated on"
            raise InputError("DataConfig.held_out_fraction", 0, expected)

    def check(self, context: EvaluationContext) -> None:
        """Opens the held-out pairs, for the first time.

        Raises:
            InputError: batches do not fit the run, or there are no held-out pairs.
        """
        context.check_data("PreferenceAccuracy", self.data)
        held_out(self.data, *batch_share(context.mesh))

    def __call__(self, context: EvaluationContext) -> dict[str, float]:
        """Returns the means over pairs of what the loss reports, see `sums_over_pairs`."""
        sums = collections.Counter()
        for batch in held_out(self.data, *batch_share(context.mesh)):
            loss, weight, figures = context.sums(
                context.params, context.place(batch), jax.random.key(0)
            )
            for name, figure in {"loss": loss, "weight": weight, **figures}.items():
                sums[name] += float(figure)
        num_pairs = sums.pop("weight")
        return {name: total / num_pairs for name, total in sums.items()}
