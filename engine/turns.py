"""One caller at a time: whoever calls an engine from another thread waits, whoever calls it from its own reward is
refused."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from stars.errors import RequestError

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = 0.1
"""Seconds after which a thread no longer insists on its place in the line: one may have been interrupted there."""


class Turns:
    """The locks an engine works under: one for each model it runs, since engines may share one.

    A thread that wants its turn waits at the entrance, where it holds up those that come later, until it has the locks:
    a loop that asks again and again (generate) does not keep the others out.
    """

    def __init__(self, locks: Sequence[threading.RLock]):
        self._locks = sorted(set(locks), key=id)  # in one order for all, so that nobody waits in a circle
        self._entrance = threading.Lock()
        _ALL.add(self)

    def take(self, call: Callable[[], T]) -> T:
        """The result of `call`, made in this thread's turn; RequestError from within a turn of this thread."""
        self.refuse_reentry()
        self._entrance.acquire(timeout=PATIENCE)
        return self._enter(self._locks, call)

    def refuse_reentry(self) -> None:
        """RequestError from within a turn of this thread."""
        if any(map(_is_owned, self._locks)):
            raise RequestError("the engine is at work in this thread: a reward cannot call the engine that asked it, "
                               "give it an engine of its own")

    def attempt(self, call: Callable[[], Any]) -> bool:
        """Makes `call` if it is nobody's turn, this thread's included, and does not wait; whether it was made.

        For finalisers, which the interpreter may run anywhere.
        """
        if any(map(_is_owned, self._locks)):
            return False
        taken = []
        try:
            for lock in self._locks:
                if not lock.acquire(blocking=False):
                    return False
                taken.append(lock)
            call()
            return True
        finally:
            for lock in reversed(taken):
                lock.release()

    def _enter(self, locks: list[threading.RLock], call: Callable[[], T]) -> T:
        # `with` on the lock itself: an interrupt finds no instruction between taking it and being sure to release it.
        with locks[0]:
            if len(locks) > 1:
                return self._enter(locks[1:], call)
            try:
                self._entrance.release()
            except RuntimeError:  # someone lost patience and opened it
                pass
            return call()

    def _after_fork(self) -> None:
        """A child has none of the other threads: what they held is free there."""
        for lock in self._locks:
            if not _is_owned(lock):
                lock._at_fork_reinit()  # type: ignore[attr-defined]
        self._entrance = threading.Lock()


_ALL: weakref.WeakSet[Turns] = weakref.WeakSet()


def one_at_a_time(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method of an object with `_turns`, run in the caller's turn."""

    @functools.wraps(method)
    def waiting(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        turns: Turns = self._turns
        return turns.take(lambda: method(self, *args, **kwargs))

    return waiting


def _is_owned(lock: threading.RLock) -> bool:
    """Whether this thread holds `lock`: what threading.Condition asks, too."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]


def _after_fork() -> None:
    for turns in list(_ALL):
        turns._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
