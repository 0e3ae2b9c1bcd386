"""Asks a run to stop after its step when the machine is taken away or the user presses Ctrl-C."""

import functools
import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Within its `with` block the first SIGTERM or SIGINT only sets a flag.

    The second one ends the process at once.

    The previous handlers are back in force after the block. Enter it from the main thread: Python
    sets handlers there.
    """

    def __init__(self):
        self._received: signal.Signals | None = None  # by this process
        self._agreed: signal.Signals | None = None  # by all processes of the run
        self._asked: jax.Array | None = None  # the all-reduce that the last call dispatched
        self._previous = {}

    def __enter__(self) -> "Preemption":
        self._received = self._agreed = self._asked = None
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def received(self) -> signal.Signals | None:
        """The signal that ends the run, whichever of its processes got it, or None."""
        return self._agreed

    def is_requested(self) -> bool:
        """Returns whether the run is to end.

        Every process calls it at every step, and all get the same answer.

        Cost: nothing for one process. For several an all-reduce of one number, which goes to the
        devices behind the step. It is read at the next call, when it has long been done, so that
        several processes stop one step later than one would.
        """
        if jax.process_count() == 1:
            self._agreed = self._received
        else:
            number = 0 if self._asked is None else int(self._asked)
            self._agreed = signal.Signals(number) if number else None
            self._asked = _start_maximum(self._received or 0)
        return self._agreed is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            # With the default action the parent sees which signal ended the run; nothing is flushed
            # or committed.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = signal.Signals(number)
        message = f"\n{self._received.name}: stopping after this step; again to end at once\n"
        # os.write, for a handler may run while the logger's lock or stderr's buffer is held.
        os.write(2, message.encode())


def _start_maximum(number: int) -> jax.Array:
    """Dispatches the maximum over all processes' numbers."""
    by_device, maximum = _maximum()

    def shard(_: tuple) -> np.ndarray:
        return np.full(1, number, np.int32)

    numbers = jax.make_array_from_callback((jax.device_count(),), by_device, shard)
    return maximum(numbers)


@functools.cache
def _maximum() -> tuple[NamedSharding, Callable]:
    """The layout of one number a device, and the compiled maximum over them."""
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    by_device = NamedSharding(mesh, PartitionSpec("device"))
    replicated = NamedSharding(mesh, PartitionSpec())
    return by_device, jax.jit(jnp.max, out_shardings=replicated)
