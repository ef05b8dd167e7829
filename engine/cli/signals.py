"""Ctrl-C and SIGTERM: noted while rows run, so that the step under way can end; raised everywhere else."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM; whoever handles Ctrl-C handles it the same way."""


@contextlib.contextmanager
def termination() -> Iterator[None]:
    """SIGTERM raises Terminated within, as SIGINT raises KeyboardInterrupt."""
    with handling(_raise, (signal.SIGTERM,)):
        yield


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM puts its number into; a second one raises at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            _raise(number, frame)
        seen.append(number)

    with handling(note, (signal.SIGINT, signal.SIGTERM)):
        yield seen


def _raise(number: int, frame: Any) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None], numbers: tuple[int, ...]) -> Iterator[None]:
    """Has `handler` called; a signal that is ignored (as in the background of a script) stays so."""
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other one may
            for number in numbers:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
