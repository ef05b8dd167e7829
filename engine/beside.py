"""Threads beside an engine's own, which serve a queue, and what an interpreter's exit does about them."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

CALL_SECONDS = 10.0
"""How long an exit waits for a call of the engine's own that is under way: a part of a round, or a grammar."""
USER_CALL_SECONDS = 1.0
"""How long it waits for one of a user's callables."""


class Beside(threading.Thread):
    """A daemon, as a thread that is not would keep the interpreter from its exit; that waits for it all the same.

    Python ends a daemon that asks for the interpreter's lock after that where it stands, by an exception of C++: in the
    midst of an operation of torch, or of freeing a tensor, it ends the process instead, with an exit code of its own.
    """

    def __init__(self, serve: Callable[[Any], None], calls: SimpleQueue[Any], name: str,
                 patience: float = CALL_SECONDS):
        super().__init__(target=serve, args=(calls,), name=name, daemon=True)
        self.patience = patience
        self.send_home = partial(end, calls)
        self.start()


def end(calls: SimpleQueue[Any]) -> None:
    """Drops what has not begun, and sends a thread home."""
    try:
        while True:
            calls.get_nowait()
    except Empty:
        calls.put(None)


def _end_all() -> None:
    """At the interpreter's exit, once no engine's loop runs: each of these ends now, or after the call it makes."""
    threads = [thread for thread in threading.enumerate() if isinstance(thread, Beside)]
    began = time.monotonic()
    for thread in threads:
        thread.send_home()
    for thread in sorted(threads, key=lambda thread: thread.patience):
        thread.join(max(0.0, began + thread.patience - time.monotonic()))


atexit.register(_end_all)  # before serve/loop.py does, whose end comes first
