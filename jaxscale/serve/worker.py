"""The engine in a thread of its own, and its answers in an event loop."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import Delta, RequestConfig
from jaxscale.types import RunError

logger = logging.getLogger(__name__)

MAX_WAIT_S = 60.0  # for a command, before it is looked whether a request has timed out


class Worker:
    """Runs an engine in a thread, which alone touches it.

    Args:
        engine: nobody else may use it from now on.
        deliver: takes what a step has drawn, in the thread; it should only pass it on.
        fail: is called once if the engine fails, with the error; the thread has ended then.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[Delta]], None],
        fail: Callable[[BaseException], None],
    ):
        self._engine = engine
        self._deliver = deliver
        self._fail = fail
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._thread.start()

    def call(self, function: Callable[[Engine], Any]) -> concurrent.futures.Future:
        """Calls a function of the engine between two steps; the future has its result.

        It has a RunError if the engine has failed.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._commands.put((function, future))
        if self._failure is not None:
            self._refuse()
        return future

    def stop(self) -> None:
        """Ends the thread after the step it is in; what runs then is never finished."""

        def end(_: Engine) -> None:
            self._is_stopping = True

        self.call(end)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._run_commands()
                if not self._is_stopping and self._engine.has_work:
                    self._deliver(self._engine.step())
        # Whatever ends the thread is told: nobody else would answer what is asked of it.
        except BaseException as error:
            logger.error("the engine failed:\n%s", traceback.format_exc())
            self._failure = error
            self._refuse()
            self._fail(error)

    def _refuse(self) -> None:
        """Answers what was asked of an engine that has failed; nobody else will."""
        error = RunError(f"the engine failed: {self._failure}")
        with contextlib.suppress(queue.Empty):
            while True:
                _, future = self._commands.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)

    def _run_commands(self) -> None:
        """Runs what is asked for; waits for it where there is nothing else to do."""
        while not self._is_stopping:
            try:
                function, future = self._commands.get(
                    block=not self._engine.has_work, timeout=min(self._engine.wait_s(), MAX_WAIT_S)
                )
            except queue.Empty:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(self._engine))
            # It is the caller's, who finds it in the future and would else wait for ever. A panic
            # of a library in Rust, such as a grammar's, is a BaseException.
            except BaseException as error:
                future.set_exception(error)


class Frontend:
    """Requests of an event loop to a worker. Make it in the loop that uses it.

    Args:
        engine: nobody else may use it from now on.
    """

    def __init__(self, engine: Engine):
        self._loop = asyncio.get_running_loop()
        self._answers: dict[int, tuple[Answers, int]] = {}  # and its first choice
        self.failure: BaseException | None = None
        self._worker = Worker(engine, self._deliver, self._fail)

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """The result of a function of the engine, called between two steps.

        Raises:
            RunError: the engine has failed.
        """
        self._check()
        return await asyncio.wrap_future(self._worker.call(function))

    async def steer(self, function: Callable[[Engine], list[Delta]]) -> None:
        """Calls a function of the engine that returns what was being drawn; Raises as `call`."""
        await self.call(lambda engine: self._deliver(function(engine)))

    async def submit(
        self,
        prompts: Sequence[str | Sequence[int]],
        configs: Sequence[RequestConfig],
    ) -> "Answers":
        """Has each prompt continued as its config says; whoever asks has to close the answers.

        Raises:
            InputError: as `Engine.add`; then no prompt is continued.
            RunError: the engine has failed.
        """
        self._check()
        counts = [config.num_sequences for config in configs]
        answers = Answers(self, sum(counts))

        def add(engine: Engine) -> list[int]:
            requests = engine.add_all(prompts, configs)
            # The loop runs this before it is given the first delta.
            self._loop.call_soon_threadsafe(self._register, requests, answers, counts)
            return requests

        adding = asyncio.ensure_future(asyncio.wrap_future(self._worker.call(add)))
        try:
            # Shielded: if the client goes while its prompts are added, they are known here.
            await asyncio.shield(adding)
        except asyncio.CancelledError:
            adding.add_done_callback(lambda _: answers.close())
            raise
        return answers

    def cancel(self, requests: Sequence[int]) -> None:
        """Ends requests of the engine, in whatever state they are."""

        def cancel(engine: Engine) -> None:
            for request in requests:
                engine.cancel(request)

        self.forget(requests)
        if self.failure is None:
            self._worker.call(cancel)

    def forget(self, requests: Sequence[int]) -> None:
        """Listens no longer to what the engine draws for requests."""
        for request in requests:
            self._answers.pop(request, None)

    def close(self) -> None:
        """Ends the engine's thread."""
        if self.failure is None:
            self._worker.stop()

    def _check(self) -> None:
        if self.failure is not None:
            raise RunError(f"the engine failed: {self.failure}") from self.failure

    # In the worker's thread

    def _deliver(self, deltas: list[Delta]) -> None:
        if deltas:
            self._loop.call_soon_threadsafe(self._hand_out, deltas)

    def _fail(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._hand_out_failure, error)

    # In the loop

    def _register(
        self,
        requests: list[int],
        answers: "Answers",
        counts: list[int],
    ) -> None:
        answers.requests = requests
        firsts = itertools.accumulate(counts, initial=0)
        for request, first in zip(requests, firsts, strict=False):
            self._answers[request] = answers, first

    def _hand_out(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.request in self._answers:
                answers, first = self._answers[delta.request]
                answers.put(first + delta.index, delta)

    def _hand_out_failure(self, error: BaseException) -> None:
        self.failure = error
        for answers, _ in self._answers.values():
            answers.fail(error)


class Answers:
    """What the engine draws for some prompts, choice by choice: those of a prompt in a row.

    Whoever has it closes it in any case: a stream whose client has gone is never begun.

    Args:
        frontend: that has asked the engine.
        num_choices: of all prompts.
    """

    def __init__(self, frontend: Frontend, num_choices: int):
        self._frontend = frontend
        self._queue: asyncio.Queue = asyncio.Queue()
        self.num_choices = num_choices
        self.num_open = num_choices
        self.requests: list[int] = []

    def put(self, choice: int, delta: Delta) -> None:
        """Takes what is new of a choice."""
        self._queue.put_nowait((choice, delta))

    def fail(self, error: BaseException) -> None:
        """Takes the error of an engine that has failed."""
        self._queue.put_nowait(error)

    def close(self) -> None:
        """Ends what is not finished, and listens no longer."""
        if self.num_open:
            self._frontend.cancel(self.requests)
        self._frontend.forget(self.requests)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(choice, what is new of it) as it comes.

        Raises:
            RunError: the engine has failed.
        """
        while self.num_open:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise RunError(f"the engine failed: {item}") from item
            choice, delta = item
            self.num_open -= delta.finish_reason is not None
            yield choice, delta
