"""A thread that runs calls beside their owner's thread, one after the other."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from queue import SimpleQueue

from stars.beside import Beside

Calls = SimpleQueue["tuple[Callable[[], None], SimpleQueue[BaseException | None]] | None"]


class Helper:
    """Runs one call at a time; its thread begins with the first and ends with its owner.

    By queues that are written in C: of an executor and its futures both threads take twice the time for a call, when a
    model's pass has left nothing in the caches.
    """

    def __init__(self, name: str):
        self._name = name
        self._calls: Calls = SimpleQueue()
        self._thread: Beside | None = None
        self._answer: SimpleQueue[BaseException | None] = SimpleQueue()
        self._under_way = False
        weakref.finalize(self, self._calls.put, None).atexit = False  # beside.py looks after exits

    def begin(self, call: Callable[[], None]) -> None:
        """Has it run; the one before must have been waited for."""
        if self._thread is None or not self._thread.is_alive():  # nor is it in a child of a fork
            self._thread = Beside(_serve, self._calls, self._name)
        self._under_way, self._answer = True, SimpleQueue()
        self._calls.put((call, self._answer))

    def wait(self) -> None:
        """Returns once the call has ended; raises what it raised."""
        error = self._answer.get()
        self._under_way = False
        if error is not None:
            raise error

    def settle(self) -> None:
        """Returns once nothing runs, wherever the owner was interrupted between `begin` and `wait`."""
        if self._under_way:
            self.begin(_nothing)  # calls are run in order
            self.wait()


def _serve(calls: Calls) -> None:
    while (given := calls.get()) is not None:
        call, answer = given
        try:
            call()
        except BaseException as error:  # handed to whoever waits
            answer.put(error)
        else:
            answer.put(None)
        del given, call, answer


def _nothing() -> None:
    pass
