"""A process of its own for what a library may do without bound, or bring down with the whole process it is in."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any


class TooSlow(Exception):
    """An answer took longer than it may: so many seconds."""


class Broken(Exception):
    """The process has ended: for want of memory, or because the library broke it."""


class Confined:
    """Asks a process of its own, which is a Python script: JSON lines in, one JSON line out for each.

    The process starts at the first question and ends with this object or with this process. One that answers too late,
    or never, is ended; the next question starts another. Any thread may ask, one at a time.
    """

    script = ""
    """Gets the bytes of address space it may take as its argument; its first line in is what `_beginning` returns."""

    def __init__(self) -> None:
        self._forget()

    def _beginning(self) -> Any:
        """What the process is told first."""
        raise NotImplementedError

    def _forget(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def _answer(self, question: Any, seconds: float, start_seconds: float, memory: int) -> Any:
        """The answer to `question`, within `seconds`. start_seconds: for the process to be ready. Raises TooSlow,
        Broken, and OSError where no process can be started."""
        if self._owner != os.getpid():  # forked: the other process is the parent's
            self._forget()
        with self._lock:
            try:
                if self._process is None:
                    self._start(start_seconds, memory)
                return self._exchange(question, seconds)
            except BaseException:  # an interrupt too: its answer would be taken for the next one's
                self._stop()
                raise

    def _start(self, seconds: float, memory: int) -> None:
        command = [sys.executable, "-c", self.script, str(memory)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        # A session of its own: an interrupt at the terminal is this process's to handle.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                                         stderr=subprocess.DEVNULL, start_new_session=True, bufsize=0)
        self._finalizer = weakref.finalize(self, _end, self._process, os.getpid())
        self._exchange(self._beginning(), seconds)

    def _stop(self) -> None:
        if self._process is not None:
            self._process = None  # first: an interrupt here must not leave a process that has ended
            self._finalizer()

    def _exchange(self, question: Any, seconds: float) -> Any:
        """Sends one line and reads one, neither longer than `seconds` in all."""
        deadline = time.monotonic() + seconds
        process = self._process
        assert process is not None and process.stdout is not None and process.stdin is not None
        reading, writing = process.stdout.fileno(), process.stdin.fileno()
        pipes = select.poll()
        pipes.register(reading, select.POLLIN)
        pipes.register(writing, select.POLLOUT)
        unsent = memoryview(json.dumps(question).encode() + b"\n")
        parts: list[bytes] = []
        os.set_blocking(writing, False)
        while not parts or not parts[-1].endswith(b"\n"):
            if not unsent and len(parts) == 0:
                pipes.modify(writing, 0)
            ready = dict(pipes.poll(1e3 * max(0.0, deadline - time.monotonic())))
            if not ready:
                raise TooSlow(seconds)
            if writing in ready and unsent:
                try:
                    unsent = unsent[os.write(writing, unsent[: 1 << 16]) :]
                except BrokenPipeError:  # what it said before it ended, if anything, is read below
                    unsent = unsent[:0]
            if reading in ready:
                parts.append(os.read(reading, 1 << 20))
                if not parts[-1]:
                    raise Broken
        return json.loads(b"".join(parts))


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
