"""What SIGTERM and SIGINT do to a run: it ends at once, or after the step in hand and its save.

Python runs a signal's handler in the main thread between two of its own instructions. So an
exception raised there is lost if the thread is in a callback of another library, and comes late if
it is in a compilation. A thread of ours is told of a signal at once, whatever the main thread does.
"""

import functools
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_WISH_S = 2.0  # launchers deliver a signal twice
RETRY_S = 0.5
PATIENCE_S = 4.0  # until a process that has nothing to save is ended from outside


class Preemption:
    """Hears SIGTERM and SIGINT within its `with` block, at any moment.

    Until `protect` is called there is nothing to save: the first signal raises KeyboardInterrupt or
    SystemExit in the main thread, and if that has not left the block after PATIENCE_S the process
    ends, unless it is an interactive one. After `protect` the first signal only sets a flag. A
    signal more than SAME_WISH_S after the first ends a protected process at once.

    The previous handlers are back in force after the block. Enter it from the main thread: Python
    sets handlers there.
    """

    def __init__(self):
        self._reset()
        self._previous = {}

    def _reset(self) -> None:
        self._received: signal.Signals | None = None  # by this process
        self._received_at = math.inf
        self._num_heard = itertools.count()
        self._agreed: signal.Signals | None = None  # by all processes of the run
        self._asked: jax.Array | None = None  # the all-reduce that the last call dispatched
        self._is_protected = False
        self._has_left = threading.Event()
        self._leaving = threading.Lock()

    def __enter__(self) -> "Preemption":
        self._reset()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._report_lost
        return self

    def __exit__(
        self,
        kind: type | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_protected = True  # no exception may cut this short
        with self._leaving:
            self._has_left.set()
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_fd)
        # A hook that was set within the block stays, and asks ours what it does not know.
        if sys.unraisablehook == self._report_lost:
            sys.unraisablehook = self._previous_hook
        os.close(self._write_end)  # which ends the thread
        self._thread.join()
        os.close(self._read_end)

    @property
    def received(self) -> signal.Signals | None:
        """The signal that ends the run, whichever of its processes got it, or None."""
        return self._agreed

    def protect(self) -> None:
        """From now on there is something to save: a signal is answered by `is_requested`."""
        self._is_protected = True

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
        """The handler in the main thread; the thread that watches has spoken already."""
        self._hear(number)
        if not self._is_protected:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        if time.monotonic() - self._received_at > SAME_WISH_S:
            # With the default action the parent sees which signal ended the run; nothing is flushed
            # or committed.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _report_lost(self, lost: Any) -> None:
        """Python's report of an exception in a callback; one of ours comes again."""
        is_ours = issubclass(lost.exc_type, KeyboardInterrupt | SystemExit)
        if not is_ours or self._has_left.is_set():
            self._previous_hook(lost)

    def _hear(self, number: int) -> None:
        """Notes the first signal and says what it does; called by both threads."""
        if next(self._num_heard):
            return
        self._received_at = time.monotonic()
        self._received = signal.Signals(number)
        does = "ending; nothing has changed since the last save"
        if self._is_protected:
            does = f"stopping after this step; again in {SAME_WISH_S:.0f} s to end at once"
        # os.write, for a handler may run while the logger's lock or stderr's buffer is held.
        os.write(2, f"\n{self._received.name}: {does}\n".encode())

    def _watch(self) -> None:
        """The thread: hears each signal as it comes, and ends what the handler could not end."""
        while numbers := os.read(self._read_end, 1):
            (number,) = numbers
            # Within the block another may have taken a signal over, as a server does that drains.
            if number not in SIGNALS or signal.getsignal(number) != self._handle:
                continue
            self._hear(number)
            while not (self._is_protected or self._has_left.wait(RETRY_S)):
                if time.monotonic() - self._received_at > PATIENCE_S:
                    self._end(number)
                # The handler's exception was lost, or the main thread has not come to it yet.
                with self._leaving:
                    if not self._has_left.is_set():
                        signal.pthread_kill(threading.main_thread().ident, number)

    def _end(self, number: int) -> None:
        if not hasattr(sys, "ps1"):  # which an interpreter has that somebody types into
            os._exit(128 + number)


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
