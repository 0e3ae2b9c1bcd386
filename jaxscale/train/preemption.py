"""Asks a run to stop at its next step boundary when the machine is to be taken away or the user presses Ctrl-C."""

import os
import signal
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Within its `with` block the first SIGTERM or SIGINT only sets a flag; the second ends the process at once.

    The previous handlers are back in force after the block. Enter it from the main thread: Python sets handlers there.
    """

    def __init__(self):
        self._received: signal.Signals | None = None
        self._previous = {}

    def __enter__(self) -> "Preemption":
        self._received = None
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def received(self) -> signal.Signals | None:
        """The signal that this process got, or None."""
        return self._received

    def is_requested(self) -> bool:
        """Returns whether any process of the run got a signal; all get the same answer, so all stop at the same step.

        Cost: nothing for one process, one all-gather of a byte for several, each of which must call it.
        """
        if jax.process_count() == 1:
            return self._received is not None
        return bool(multihost_utils.process_allgather(np.bool_(self._received is not None)).any())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            # With the default action the parent sees which signal ended the run; nothing is flushed or committed.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = signal.Signals(number)
        # os.write, for a handler may run while the logger's lock or stderr's buffer is held.
        os.write(2, f"\n{self._received.name}: stopping after this step; again to end at once\n".encode())
