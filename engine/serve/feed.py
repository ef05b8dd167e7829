"""What one request has for whoever awaits it: written by the engine's loop thread, read by a task of any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import NamedTuple

from stars.intake import Asked
from stars.outputs import RequestOutput
from stars.request import Owner, Request
from stars.sampling import RequestOutputKind, SamplingParams


class Waiter(NamedTuple):
    """A task that sleeps until its future is settled, in its loop."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]


def wake_all(waiters: Iterable[Waiter]) -> None:
    """Called in their event loop."""
    for waiter in waiters:
        if not waiter.future.done():
            waiter.future.set_result(None)


class Feed(Owner):
    """The outputs of one request, of which at most one waits to be fetched until the request ends.

    What changes while one waits is not built: it makes the feed `stale`, and comes with the next that is. So who is
    slow costs nothing, and deltas, which hold what is new since the last that was built, are merged and never lost.
    """

    __slots__ = ("asked", "chosen", "request_id", "request", "kind", "placed", "compiled", "seats", "deadline", "begun",
                 "dropped", "stale", "complete", "closed", "_notify", "_wake", "_acknowledged", "_accepted", "_outputs",
                 "_error", "_waiter", "_lock")

    def __init__(self, asked: Asked, request_id: str | None, notify: Callable[[Feed], None],
                 wake: Callable[[], None], acknowledged: bool):
        """notify: called where the request changed, in a turn of any thread. wake: has the loop thread look again.
        acknowledged: whether somebody waits to hear that the request was taken."""
        super().__init__()
        self.asked = asked
        self.chosen = request_id is not None  # by the user
        self.request_id = request_id
        params = asked.params
        self.kind = params.output_kind if isinstance(params, SamplingParams) else RequestOutputKind.CUMULATIVE
        # What only the loop thread uses.
        self.request: Request | None = None  # once it is checked; without its grammar, where that is being compiled
        self.placed = False  # whether it need not stand in line
        self.compiled: Future[Asked] | None = None  # with its grammar
        self.seats = 1  # responses that run side by side
        self.deadline: float | None = None  # on the monotonic clock
        self.begun = False  # whether it has been admitted
        self.dropped = False  # whether nobody wants it any more
        # What both sides use, under the lock.
        self.stale = False  # whether there is more than what waits to be fetched
        self.complete = False  # whether all outputs are there
        self.closed = False  # whether its reader is to have no more of them
        self._notify, self._wake = notify, wake
        self._acknowledged, self._accepted = acknowledged, False
        self._outputs: deque[RequestOutput] = deque()
        self._error: Exception | None = None
        self._waiter: Waiter | None = None
        self._lock = threading.Lock()

    # -- for the task -------------------------------------------------------------------------------------------------

    async def accepted(self) -> None:
        """Returns once the request is queued; raises why it is not."""
        while True:
            with self._lock:
                if self._error is not None:
                    raise self._error
                if self._accepted:
                    return
                waiter = self._wait()
            await self._sleep(waiter)

    async def next(self) -> RequestOutput | None:
        """The next output, None after the last; raises what ended the request without one."""
        while True:
            with self._lock:
                if self._outputs:
                    output, stale = self._outputs.popleft(), self.stale
                    break
                if self._error is not None:
                    raise self._error
                if self.complete or self.closed:
                    return None
                waiter = self._wait()
            await self._sleep(waiter)
        if stale:
            self._wake()
        return output

    def close(self) -> None:
        """Whoever awaits an output is told that there are no more."""
        with self._lock:
            self.closed = True
            self._outputs.clear()
            waiter = self._pop()
        if waiter is not None:
            with contextlib.suppress(RuntimeError):  # its event loop was closed
                waiter.loop.call_soon_threadsafe(wake_all, [waiter])

    def refuse_second(self) -> None:
        """RuntimeError where another task awaits an output."""
        if self._waiter is not None:
            raise RuntimeError(f"another task awaits request {self.request_id!r} already: one at a time may")

    def _wait(self) -> Waiter:
        self.refuse_second()
        loop = asyncio.get_running_loop()
        self._waiter = Waiter(loop, loop.create_future())
        return self._waiter

    async def _sleep(self, waiter: Waiter) -> None:
        try:
            await waiter.future
        finally:
            with self._lock:
                if self._waiter is waiter:
                    self._waiter = None

    # -- for the loop thread, which wakes the waiters that these return -----------------------------------------------

    def changed(self, request_id: str, finished: bool) -> None:
        """Called by the engine, in a turn of any thread, where there is something to tell."""
        self._notify(self)

    def has_begun(self) -> bool:
        """Whether the request was admitted, or has ended before."""
        request = self.request
        self.begun = request is not None and (request.admitted is not None or request.finished)
        return self.begun

    def falls_behind(self) -> bool:
        """Whether an output waits to be fetched, so that no other is built now: who fetches it has that done."""
        with self._lock:
            self.stale = bool(self._outputs)
            return self.stale

    def accept(self) -> Waiter | None:
        """The request is queued."""
        with self._lock:
            self._accepted = True
            return self._pop() if self._acknowledged else None

    def put(self, output: RequestOutput) -> Waiter | None:
        """Hands an output on. The last one takes the place of what was not fetched, unless it says what is new only."""
        with self._lock:
            if output.finished:
                self.complete, self._accepted = True, True
                if self.kind is not RequestOutputKind.DELTA:
                    self._outputs.clear()
            self._outputs.append(output)
            self.stale = False
            return self._pop()

    def fail(self, error: Exception) -> Waiter | None:
        """There will be no more outputs, for this reason."""
        with self._lock:
            if self.complete:
                return None
            self.complete, self._error = True, error
            return self._pop()

    def left_behind(self, error: Exception) -> None:
        """After a fork, in the child, where the loop thread is not: its lock may have been held."""
        self._lock = threading.Lock()
        self._waiter = None
        self.fail(error)

    def _pop(self) -> Waiter | None:
        waiter, self._waiter = self._waiter, None
        return waiter
