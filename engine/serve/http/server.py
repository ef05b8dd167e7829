"""uvicorn with our guard at the door, and with an end that lets requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from stars.cli.signals import handling
from stars.serve.http.app import build_app
from stars.serve.http.guard import Door, Guard
from stars.serve.http.leaving import MOST_LINGERING
from stars.serve.http.limits import HEAD_BYTES
from stars.serve.http.service import Service

KEEP_ALIVE_SECONDS = 15  # that a connection may be idle between two requests
ACCEPTED_AT_ONCE = 128
"""Connections, between which requests that run have their turn. It takes a few such turns until what a new one says is
read: fewer where only few may be open, since it could have to give way before."""
TURNS = 8
BACKLOG = 4096  # connections that the system holds meanwhile
TOLD_SECONDS = 5.0
"""How long clients may take to read the end of what was cut off by the end of --drain-seconds."""
SENT_AHEAD = 1 << 17
"""Bytes that the system holds for a client: megabytes, if it chose, for each that does not read, and whether one reads
were seen in leaps of as many."""
SPARE_FILES = 64 + MOST_LINGERING
"""Files of the process that are no connections."""


class Server(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C: then it lets in no more requests, lets those under way go on for `drain_seconds`,
    ends the rest with what was committed, and returns. A second signal ends the process at once."""

    def __init__(self, service: Service, listening: socket.socket, listens: Callable[[str], None] | None = None):
        """listening: a socket that is bound. listens: told the address once requests are heard there."""
        self.service = service
        self._listens = listens
        self._socket = listening
        self._until: float | None = None  # when requests under way are ended
        self._ending: asyncio.Future[None] | None = None  # once they are
        at_once = max(1, min(ACCEPTED_AT_ONCE, service.settings.max_connections // TURNS))
        super().__init__(uvicorn.Config(
            build_app(service), http=cast(Any, partial(Guard, Door(service))), loop="asyncio", ws="none",
            lifespan="off", interface="asgi3", log_config=None, access_log=False, proxy_headers=False,
            server_header=False, backlog=at_once, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1, h11_max_incomplete_event_size=HEAD_BYTES))

    def start(self) -> None:
        """Serves, and returns after the end."""
        for name in ("uvicorn.error", "asyncio"):  # whatever clients do is counted, not logged
            logging.getLogger(name).setLevel(logging.ERROR)
        self.run(sockets=[self._socket])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says where."""
        await super().startup(sockets)
        self._socket.listen(BACKLOG)
        if self._listens is not None:
            self._listens(address(self._socket))

    async def on_tick(self, counter: int) -> bool:
        """Whether to end."""
        if await super().on_tick(counter):
            return True
        if self._until is None:
            return False
        if not self.service.traffic.under_way and not self._is_read_to():
            return True
        now = time.monotonic()
        if self._ending is None and now >= self._until:
            self._ending = asyncio.ensure_future(self.service.engine.shutdown(drain=False))
        return now >= self._until + TOLD_SECONDS

    def _is_read_to(self) -> bool:
        """Whether a client has yet to read what it was answered."""
        connections = cast(Iterable[Guard], self.server_state.connections)
        return any(one.leaving.get_write_buffer_size() for one in connections)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes what is open."""
        await super().shutdown(sockets)
        ending = self._ending or self.service.engine.shutdown(drain=False)
        with contextlib.suppress(asyncio.TimeoutError):  # of a round that does not end, in a reward for one
            await asyncio.wait_for(ending, TOLD_SECONDS)

    def drain(self) -> None:
        """Lets no more requests in, and ends once the others have."""
        self.service.draining = True
        self._until = time.monotonic() + self.service.settings.drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends the process."""
        if self._until is not None:
            _say(b"stars: interrupted\n")
            os._exit(128 + sig)  # nothing is to be saved, and threads may be in the midst of a round
        _say(b"stars: shutting down once the requests under way have ended; again to end at once\n")
        self.drain()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals that are ignored stay so."""
        with handling(self.handle_exit, (signal.SIGINT, signal.SIGTERM)):
            yield


def _say(line: bytes) -> None:
    """From within a signal handler, where print may be in the midst of another line."""
    with contextlib.suppress(OSError):
        os.write(2, line)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at this address. OSError where that cannot be."""
    family, _, _, _, place = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE),
                                 key=lambda found: found[0] != socket.AF_INET)
    # The protocol by name: asyncio sends what is written at once (TCP_NODELAY) only over sockets that say it.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT_AHEAD)  # which connections take over
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.bind(place)
    except BaseException:
        made.close()
        raise
    return made


def address(listening: socket.socket) -> str:
    """What a browser is given to reach it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def room_for(connections: int) -> int:
    """How many of these connections the process may have, once it has all the files that it may."""
    if sys.platform == "win32":
        return connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - SPARE_FILES))
