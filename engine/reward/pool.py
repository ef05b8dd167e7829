"""Threads that make slow calls for a reward, whose answers come later."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from stars.beside import USER_CALL_SECONDS, Beside, end
from stars.errors import RewardError, describe


class Pool:
    """At most `max_workers` threads, begun as calls come; they end with the pool.

    An engine that is collected waits for no call, and a process that exits for a second at most (beside.py says why).
    """

    def __init__(self, max_workers: int):
        self.max_workers = max_workers
        self._begin()

    def submit(self, call: Callable[[], Sequence[Any]], count: int) -> list[Future[Any]]:
        """Has `call` made, which returns `count` results, such as rewards: a Future of each, of a RewardError where it
        raises. Where all were cancelled before, it is not made."""
        if self._process != os.getpid():  # a child has none of its parent's threads
            self._begin()
        futures: list[Future[Any]] = [Future() for _ in range(count)]
        self._calls.put(_Call(call, futures))
        with self._lock:
            if self._threads < self.max_workers:
                self._threads += 1
                Beside(_work, self._calls, "stars-reward", USER_CALL_SECONDS)
        return futures

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._threads = 0
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        weakref.finalize(self, end, self._calls).atexit = False  # beside.py looks after exits


class _Call(NamedTuple):
    call: Callable[[], Sequence[Any]]
    futures: list[Future[Any]]


def _work(calls: queue.SimpleQueue[_Call | None]) -> None:
    """What a thread does. It knows the queue and not the pool, which can be collected."""
    while (asked := calls.get()) is not None:
        wanted = [future for future in asked.futures if future.set_running_or_notify_cancel()]
        if wanted:
            rewards: Sequence[Any]
            try:
                rewards = asked.call()
            except BaseException as error:  # in this thread there is nobody else to take it
                rewards = [RewardError(f"the reward raised {describe(error)}")] * len(asked.futures)
            for future, reward in zip(asked.futures, rewards, strict=True):
                if not future.cancelled():
                    future.set_result(reward)
            del rewards, future, reward  # of which those who wait, and so an engine, hang
        del asked, wanted
    calls.put(None)  # for the next one
