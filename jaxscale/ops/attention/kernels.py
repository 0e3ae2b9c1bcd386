"""Our attention kernels for GPUs, for float16 and bfloat16."""

import dataclasses

from jaxscale.kernels.attention import api as kernel
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.types import Array

# The name of what a kernel computed, for rematerialisation policies.
OUTPUT = kernel.OUTPUT_NAME


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of one family, as a backend.

    Args:
        family: "mosaic" or "triton".
        is_invariant: as for `kernels.attention.api.attention`.
    """

    family: str
    is_invariant: bool = False

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: AttentionContext,
    ) -> Array:
        """Attention without tiles of other documents or outside the window; as `attention`."""
        o, _ = kernel.attention(
            q,
            k,
            v,
            *context.key_intervals(),
            scale=context.logits_scale(q.shape[3]),
            softcap=context.softcap,
            layout=context.layout,
            is_invariant=self.is_invariant,
            implementation=self.family,
        )
        return o

    def refusal(self, q: Array, context: AttentionContext) -> str | None:
        """What of the request it cannot do, as the text of an error; None when it can."""
        if not context.is_aligned:
            return "a backend that takes keys at other positions than the queries'"
        has_documents = context.segments is not None or context.window is not None
        if context.layout is not None and has_documents:
            return "a backend that combines a layout of blocks with documents or a window"
        return kernel.refusal(self.family, q, q)
