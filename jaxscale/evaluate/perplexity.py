"""Held-out loss: nats a token, perplexity and bits per byte.

As an evaluator of a run, and as the `evaluate` verb.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np

from jaxscale.data.loader import (
    DataConfig,
    HeldOutLoader,
    make_loader,
)
from jaxscale.data.tokenizer import check_vocabulary, load_tokenizer
from jaxscale.models.evaluation import EvaluationContext
from jaxscale.parallel.batch import batch_share
from jaxscale.types import Batch, InputError, check_positive, check_types


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
    """Evaluator that goes once over the held-out documents.

    A document's first token is given and the one that ends it is predicted. Bytes are those of the
    text after the first token, so that models whose tokenizers give away more or less of a document
    can be compared. What it costs to predict the end is spread over them.

    Source: bits per byte, Gao et al. 2020 (arXiv 2101.00027), section 3.1.
    Args:
        data: as the run's.
        max_batches: at most so many batches, evenly spread over the pass, with the bytes per token
            of the whole pass.
    """

    data: DataConfig
    max_batches: int | None = None

    def __post_init__(self):
        check_types(self)
        if self.max_batches is not None:
            check_positive("BitsPerByte.max_batches", self.max_batches)
        if self.data.held_out_fraction == 0:
            raise InputError(
                "DataConfig.held_out_fraction",
                0,
                "above 0: no document is held out to be evaluated on",
            )

    def check(self, context: EvaluationContext) -> None:
        """Opens the held-out documents, for the first time.

        Raises:
            InputError: the documents are pairs of answers, the tokenizer knows more tokens than the
                model, batches do not fit the run, there are no held-out documents, or each of them
                is a single token.
        """
        if self.data.is_paired:
            expected = "text or chats: PreferenceAccuracy measures pairs"
            raise InputError("BitsPerByte.data", self.data.sources, expected)
        check_vocabulary(load_tokenizer(self.data.tokenizer), context.model.vocab_size)
        context.check_data("BitsPerByte", self.data)
        loader = held_out(self.data, *batch_share(context.mesh))
        if not loader.num_scored_bytes:
            expected = "held-out documents with more than one token: no byte of these is predicted"
            fraction = self.data.held_out_fraction
            raise InputError("DataConfig.held_out_fraction", fraction, expected)

    def __call__(self, context: EvaluationContext) -> dict[str, float]:
        """Returns `loss` (nats a token), `perplexity` and `bits_per_byte`."""
        nll = weight = 0.0
        loader = held_out(self.data, *batch_share(context.mesh))
        for batch in self._batches(loader):
            _, batch_weight, metrics = context.sums(
                context.params, context.place(batch), jax.random.key(0)
            )
            nll, weight = nll + float(metrics["nll"]), weight + float(batch_weight)
        loss = nll / max(weight, 1.0)
        tokens_per_byte = loader.num_tokens / loader.num_scored_bytes
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # beyond is no float
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        }

    def _batches(self, loader: HeldOutLoader) -> Iterator[Batch]:
        """All in order, or some, evenly spread.

        Rows are packed with the longest piece first, so that the first batches are no sample.
        """
        total = len(loader)
        if self.max_batches is None or self.max_batches >= total:
            return iter(loader)
        numbers = np.linspace(0, total - 1, self.max_batches).round().astype(int)
        return (loader.batch_at(int(n)) for n in numbers)


@functools.lru_cache(maxsize=4)  # opened once for all of a run's evaluations
def held_out(data: DataConfig, index: int, count: int) -> HeldOutLoader:
    """The held-out documents for one host of several."""
    return make_loader(data, split="held_out", process_index=index, process_count=count)
