"""Ends a process that waits for ever in a collective because another is stuck or dead."""

import faulthandler
import os
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

import jax

EXIT_LOST_PEER = 75  # EX_TEMPFAIL of sysexits.h: starting again may help
SLOW_FACTOR = 6  # for what is not a step: start, compilation, evaluation, checkpoints
MAX_POLL_S = 1.0


class Watchdog:
    """Within its `with` block, no progress for too long ends the process with EXIT_LOST_PEER.

    A thread watches. The main thread cannot raise an error by itself: it waits in a collective that
    no timeout of XLA or NCCL ends. So the thread writes what was going on, how long, and every
    thread's stack to stderr, and ends the process by os._exit. The block also does so, at once,
    when a collective fails because the connection to another process broke. Committed checkpoints
    are not touched; one that is being written is left as an unfinished folder, which a restart
    removes.

    Args:
        timeout_s: seconds without progress in a step; SLOW_FACTOR times as many in what is
            announced as slow; None for no watch.
        leave: called with the exit status.
    """

    def __init__(self, timeout_s: float | None, leave: Callable[[int], None] = os._exit):
        self._timeout_s = timeout_s
        self._leave = leave
        self._now = ("start", float("inf"))
        self._who = f"process {jax.process_index()} of {jax.process_count()}"
        self._waited_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout_s is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            traceback.print_exception(error)
            self._end(f"failed in {self._now[0]}: {str(error).splitlines()[0]}")
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def watch(self, activity: str, *, is_slow: bool = False) -> None:
        """Says what the main thread begins now; the time begins anew."""
        if self._timeout_s is not None:
            self._now = (activity, self._timeout_s * (SLOW_FACTOR if is_slow else 1))
        self._waited_s = 0.0

    def _look_on(self) -> None:
        """Ends the process once it has waited too long.

        A period counts as twice its length at most: a process that was stopped and continued has
        not waited all that time.
        """
        period = min(MAX_POLL_S, self._timeout_s / 4)
        before = time.monotonic()
        while not self._is_over.wait(period):
            now = time.monotonic()
            self._waited_s += min(now - before, 2 * period)
            before = now
            activity, limit_s = self._now
            if self._waited_s > limit_s:
                waited = f"no progress for {self._waited_s:.0f} s"
                self._end(f"{waited} in {activity}, limit {limit_s:g} s")
                return

    def _end(self, what: str) -> None:
        message = (
            f"\njaxscale: {self._who}: {what}. Another process is stuck or dead, or this one is. "
            "Checkpoints are intact: start the run again to go on from the newest. "
            f"Exit status {EXIT_LOST_PEER}; stacks of this process:\n"
        )
        # Not through sys.stderr, whose lock the stuck thread may hold.
        os.write(2, message.encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._leave(EXIT_LOST_PEER)
