"""A thread for calls that take long, one after the other, whose results tasks await."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from stars.beside import Beside

T = TypeVar("T")
Calls: TypeAlias = "SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]"


class Aside:
    """The thread begins with the first call and ends with its owner."""

    def __init__(self, name: str):
        self._name = name
        self._calls: Calls = SimpleQueue()
        self._thread: Beside | None = None
        self._lock = threading.Lock()
        weakref.finalize(self, self._calls.put, None).atexit = False  # beside.py looks after exits

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Has `call` made, unless its Future is cancelled before its turn. Any thread may ask."""
        future: Future[T] = Future()
        with self._lock:
            if self._thread is None:
                self._thread = Beside(_serve, self._calls, self._name)
        self._calls.put((call, future))
        return future


def _serve(calls: Calls) -> None:
    """What the thread does. It knows the queue and not the owner, which can be collected."""
    while (given := calls.get()) is not None:
        call, future = given
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:  # handed to whoever waits
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del given, call, future
