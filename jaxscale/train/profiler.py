"""A profile of some steps."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Records the steps of a window; a run that resumes within the window records the rest of it.

    Args:
        window: from the first number of finished steps to the second; None for never.
        directory: where the profile goes, for TensorBoard or Perfetto.
    """

    def __init__(self, window: tuple[int, int] | None, directory: Path):
        self._first, self._second = window or (0, 0)
        self._directory = directory
        self._is_running = False

    def update(self, finished: int, state: Any) -> None:
        """Starts or stops at the window's edges, with the devices idle at both."""
        is_wanted = self._first <= finished < self._second
        if is_wanted == self._is_running:
            return
        jax.block_until_ready(state)
        if is_wanted:
            jax.profiler.start_trace(str(self._directory))
            self._is_running = True
        else:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded so far."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
