"""What a pipeline stage holds from one tick to the next."""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxscale.parallel.pipeline.loss import Sums
from jaxscale.parallel.pipeline.slots import add, add_to_slot, write_slot
from jaxscale.types import Array, Params


class Bank(NamedTuple):
    """Residual slots that lie together, leaves [slots of a bank, ...].

    Args:
        kept: what forwards keep.
        extra: what backwards leave for the weight gradients, if the schedule splits them off.
    """

    kept: tuple
    extra: tuple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What a stage holds between ticks. The methods return it with one thing changed.

    Args:
        activations, cotangents: [slots + 1, b, t, D]; the last slot takes what nobody reads.
        banks: the residual slots.
        activation_sent: [b, t, D] for the next stage.
        cotangent_sent: [b, t, D] for the previous stage.
        layers: gradients so far, of the layers that `LossParts.body` takes; leaves [v, ...] if the
            stage has v > 1 chunks.
        rest: gradients so far, of the parameters that are in no layer.
        sums: the loss's sums so far.
        by_layer: the body's metrics so far, leaves [v, layers of a chunk, ...].
    """

    activations: Array
    cotangents: Array
    banks: tuple[Bank, ...]
    activation_sent: Array
    cotangent_sent: Array
    layers: Params
    rest: Params
    sums: Sums
    by_layer: dict[str, Array]

    def keep(self, bank: int, index: Array, kept: tuple) -> "Carry":
        """Fills a residual slot with what a forward keeps."""
        slots = write_slot(self.banks[bank].kept, index, kept)
        return self._with_bank(bank, self.banks[bank]._replace(kept=slots))

    def keep_extra(self, bank: int, index: Array, extra: tuple) -> "Carry":
        """Adds to a residual slot what a backward leaves for the weight gradient."""
        slots = write_slot(self.banks[bank].extra, index, extra)
        return self._with_bank(bank, self.banks[bank]._replace(extra=slots))

    def _with_bank(self, number: int, bank: Bank) -> "Carry":
        banks = list(self.banks)
        banks[number] = bank
        return dataclasses.replace(self, banks=tuple(banks))

    def store_activation(self, index: Array, x: Array) -> "Carry":
        """Fills an activation slot."""
        slots = write_slot(self.activations, index, x)
        return dataclasses.replace(self, activations=slots)

    def store_cotangent(self, index: Array, dy: Array) -> "Carry":
        """Fills a cotangent slot."""
        slots = write_slot(self.cotangents, index, dy)
        return dataclasses.replace(self, cotangents=slots)

    def add_layers(self, gradient: Params, chunk: Array | None) -> "Carry":
        """Adds a gradient of a chunk's layers; None if the stage has one chunk only."""
        if chunk is None:
            layers = add(self.layers, gradient)
        else:
            layers = add_to_slot(self.layers, chunk, gradient)
        return dataclasses.replace(self, layers=layers)

    def add_rest(self, gradient: Params) -> "Carry":
        """Adds a gradient of the parameters that are in no layer."""
        return dataclasses.replace(self, rest=add(self.rest, gradient))

    def add_body_figures(
        self,
        loss: Array,
        metrics: Any,
        chunk: Array,
    ) -> "Carry":
        """Adds what `LossParts.body` returns beside the residual."""
        first, *others = self.sums
        sums = (first + loss, *others)
        by_layer = add_to_slot(self.by_layer, chunk, metrics)
        return dataclasses.replace(self, sums=sums, by_layer=by_layer)
