"""What the client itself takes: whether it, and not the server, was what a run waited for."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator

INTERVAL = 0.01  # seconds between two looks at the event loop


class Meter:
    """CPU seconds of this process and lag of its event loop, while `measuring`."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.lags: list[float] = []  # seconds by which the loop came back too late

    @contextlib.asynccontextmanager
    async def measuring(self) -> AsyncIterator[None]:
        """Measures what happens inside."""
        watcher = asyncio.create_task(self._watch())
        wall, cpu = time.perf_counter(), _cpu_seconds()
        try:
            yield
        finally:
            self.wall, self.cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    @property
    def cpu_share(self) -> float:
        """Of one core."""
        return self.cpu / self.wall if self.wall else 0.0

    async def _watch(self) -> None:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(INTERVAL)
            self.lags.append(max(0.0, time.perf_counter() - begin - INTERVAL))


def allow_connections(count: int) -> None:
    """Raises this process' limit of open files to so many connections, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256 if hard == resource.RLIM_INFINITY else min(count + 256, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
