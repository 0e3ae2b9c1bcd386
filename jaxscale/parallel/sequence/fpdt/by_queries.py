"""The backward of a layer whose keys lie on the device.

It goes from the last chunk of queries to the first. A chunk of queries meets all its keys in one
call of the kernel, and waits nowhere before or after that. The keys of a chunk are seen last by the
queries of the same chunk, so that the gradients of its queries, keys and values are complete
together, as they are in `by_keys`.
"""

import jax
import jax.numpy as jnp

from jaxscale.ops.attention.intervals import row_sums
from jaxscale.parallel.sequence.fpdt.backward import Backward, zeros
from jaxscale.parallel.sequence.fpdt.cuts import fetch, tied
from jaxscale.parallel.sequence.fpdt.keys import Keys
from jaxscale.parallel.sequence.fpdt.stream import Saved
from jaxscale.types import Array


class ByQueries(Backward):
    """The backward of one layer while it is traced; arguments as `Backward`."""

    def over_chunks(self) -> None:
        """As `Backward`."""
        again = self.attend_again() if self.is_attended_again else None
        last = self.cuts.num - 1
        coming, self.dx = self.coming_saved(last, self.dx)
        keys = again or self._keys(coming.x)
        kv = tuple(keys.kept)
        dkv = tuple(map(zeros, kv))
        for number in range(last, -1, -1):
            coming, dkv = self._one_chunk(number, coming, kv, dkv)

    def _keys(self, x_last: Array) -> Keys:
        """The keys and values of all chunks; of the last the input is on the device."""
        keys = Keys(self.stream.attention, self.cuts.num, "device")
        earlier = [saved.x for saved in self.saved[:-1]]
        if earlier:
            coming, self.dx = fetch(self.places.inputs[0], earlier[0], self.dx)
        for i in range(self.cuts.num):
            x = coming if i < len(earlier) else x_last
            x, self.dx = tied((x, self.dx))
            if i + 1 < len(earlier):
                coming, x = fetch(self.places.inputs[i + 1], earlier[i + 1], x)
            _, *kv = self.project(i)(self.params, x)
            keys.add(i, kv)
            keys.kept, self.dx = tied((keys.kept, self.dx))
        return keys

    def _one_chunk(
        self,
        number: int,
        saved: Saved,
        kv: tuple[Array, Array],
        dkv: tuple[Array, Array],
    ) -> tuple[Saved | None, tuple[Array, Array]]:
        """All of the backward of a chunk, while what was kept of the one before it comes.

        Args:
            number: of the chunk.
            saved: of its forward, as it comes.
            kv: keys and values of the sequence.
            dkv: their gradients through later queries.
        Returns:
            (what comes, None after the first chunk; dkv through these queries too).
        """
        saved, self.dx = tied((saved, self.dx))
        x, do = self.before_attention(number, saved)
        (q, _, _), pull = jax.vjp(self.project(number), self.params, x)
        delta = row_sums(saved.o, do)
        coming = None
        if number:
            coming, q = self.coming_saved(number - 1, q)
        seen = self.tokens.intervals.of(number, q.shape[1])
        backward = self.stream.attention.backward
        dq, *parts = backward(q, *kv, do, saved.lse, delta, *seen)
        dkv = tuple(map(jnp.add, dkv, parts))
        complete = dq, *(self.cuts.own(each, number) for each in dkv)
        self.after_attention(number, pull(tuple(each.astype(q.dtype) for each in complete)))
        return coming, dkv
