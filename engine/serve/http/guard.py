"""Connections: how many there may be, and how long they may do nothing.

uvicorn's h11 protocol with what it leaves out. A connection on which nothing is asked gives way to a new one where
there are too many, the oldest first: however many are opened and left, who asks is heard.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import OrderedDict
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from stars.serve.http.errors import ApiError
from stars.serve.http.leaving import Leaving, Lingering
from stars.serve.http.limits import MOST_LINES
from stars.serve.http.service import Service

PIPELINED_BYTES = 1 << 16
"""Of requests behind the one that is being answered: beyond, nothing is read until it is."""
SLICE = 1 << 13
"""Bytes that h11 is given at once: it takes dozens of microseconds for every chunk of a body, however small."""
LEAST_PIECE = 64
"""Bytes of a chunked body for each end of a line in it, of which a chunk has two; there may be this many lines more."""
FREE_LINES = 1024
MESSAGES = {400: "this is no HTTP request that can be read", 431: "the request's head is too long",
            501: "this is an HTTP feature that the server does not have"}


class Door:
    """What the connections of one server share."""

    def __init__(self, service: Service):
        self.service = service
        self.quiet: OrderedDict[Guard, None] = OrderedDict()  # on which no request is under way, the oldest first
        self.lingering = Lingering()

    def make_room(self) -> bool:
        """Whether there is room for one more connection, if need be in place of one that asks nothing."""
        if self.service.traffic.open_connections < self.service.settings.max_connections:
            return True
        if not self.quiet:
            return False
        next(iter(self.quiet)).give_way()
        return True


class Guard(H11Protocol):
    """One connection."""

    def __init__(self, door: Door, config: Config, server_state: ServerState, app_state: dict[str, Any],
                 _loop: asyncio.AbstractEventLoop | None = None):
        super().__init__(config, server_state, app_state, _loop)
        self.door = door
        self.access_log = False
        self.asked = False  # whether it ever sent a whole head
        self._counted = self._refused = False
        self._head_timer: asyncio.TimerHandle | None = None  # while a head is awaited
        self._held = bytearray()  # what came and h11 has not seen: behind a request that is being answered
        self._cycle = self.cycle  # of which the next three are known
        self._chunked = False  # whether its body comes in chunks
        self._lines = self._bytes = 0  # of the body so far, or of the next head

    # -- what asyncio calls -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Counts it; one too many is told so."""
        self.leaving = Leaving(cast(asyncio.Transport, transport), self.loop, self.door.service, self.door.lingering,
                               self._is_sending)
        super().connection_made(cast(asyncio.Transport, self.leaving))
        traffic = self.door.service.traffic
        room = self.door.make_room()
        self._counted = True
        traffic.open_connections += 1
        if room:
            self._await_head()
        else:
            traffic.closed("crowded")
            self._refused = True
            self._crowded()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        self.leaving.forget()
        self._got_head()
        self.door.quiet.pop(self, None)
        self._uncount()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Looks whether what came is the whole head of a request, and throws away what comes behind the last answer."""
        if self.leaving.closing:
            self.leaving.throw_away(data)
            return
        self._held += data
        self._go_on()

    def pause_writing(self) -> None:
        """The client is behind: it has so long to read on."""
        super().pause_writing()
        self.leaving.await_reader()

    def resume_writing(self) -> None:
        """It read."""
        super().resume_writing()
        self.leaving.reader_reads()

    # -- what uvicorn calls -------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """The next head is awaited, by uvicorn until its first byte."""
        super().on_response_complete()
        self._go_on()

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read: its own status, the head that is too long among them."""
        self.door.service.traffic.closed("bad")
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.leaving.close()  # in the midst of an answer there is no place for another
        else:
            self._tell(ApiError(status, MESSAGES.get(status, MESSAGES[400]), code="bad_http"))

    # -- what came ----------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Has h11 read what is there, up to the end of a request; the next one waits until that is answered."""
        while self._held and not self.leaving.closing and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            part = bytes(self._held[:SLICE])
            del self._held[:SLICE]
            if self._is_flood(part):
                return
            super().data_received(part)
        if len(self._held) >= PIPELINED_BYTES and not self.leaving.closing:
            self.flow.pause_reading()
        self._look()

    def _is_flood(self, part: bytes) -> bool:
        """Whether head or body would take far longer to read than their lengths say; the client is told so."""
        if self.cycle is not self._cycle:
            self._cycle = self.cycle
            self._lines = self._bytes = 0
            self._chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        if self.conn.their_state is h11.IDLE:
            end = part.rfind(b"\r\n\r\n")  # of the last head in it
            self._lines = part.count(b"\n", end) if end >= 0 else self._lines + part.count(b"\n")
            if self._lines > MOST_LINES and end < 0:
                self.door.service.traffic.closed("bad")
                self._tell(ApiError(431, MESSAGES[431], code="bad_http"))
                return True
        elif self._chunked:
            self._lines += part.count(b"\n")
            self._bytes += len(part)
            if self._lines > FREE_LINES + self._bytes // LEAST_PIECE:
                self.door.service.traffic.closed("bad")
                self._tell(ApiError(400, "the body comes in too many small pieces: send larger ones", code="bad_http"))
                return True
        return False

    # -- heads --------------------------------------------------------------------------------------------------------

    def give_way(self) -> None:
        """Closes a connection on which nothing is asked; one that never asked anything is told why."""
        self.door.service.traffic.closed("crowded")
        self._got_head()
        self.door.quiet.pop(self, None)
        if self.asked:
            self.leaving.close()
            self._uncount()
        else:
            self._crowded()

    def _look(self) -> None:
        """Whether a head is still awaited."""
        if self.leaving.closing:
            self._got_head()
        elif self.conn.their_state is not h11.IDLE:
            self.asked = True
            self._got_head()
            self.door.quiet.pop(self, None)
        elif self.timeout_keep_alive_task is None:  # uvicorn's own, from an answer to the next byte
            self._await_head()
        else:
            self.door.quiet[self] = None

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.door.service.settings.header_seconds, self._late)
            self.door.quiet[self] = None

    def _got_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        self.door.service.traffic.closed("head")
        seconds = self.door.service.settings.header_seconds
        self._tell(ApiError(408, f"no request came within {seconds:g} s: send its head at once", code="head_timeout"))

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _is_sending(self) -> bool:
        """Whether its client has probably more to say, although it was answered."""
        return self._refused or self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _crowded(self) -> None:
        service = self.door.service
        self._tell(ApiError(503, f"{service.settings.max_connections} connections are open already, as many as may be: "
                            "try again later", code="too_many_connections",
                            headers={"Retry-After": str(service.traffic.retry_after())}))
        self._uncount()  # it lingers, and keeps nobody out

    def _uncount(self) -> None:
        if self._counted:
            self._counted = False
            self.door.service.traffic.open_connections -= 1

    def _tell(self, error: ApiError) -> None:
        """An answer that no handler gives, and the end of the connection."""
        if self.leaving.closing:
            return
        if self.cycle is not None and not self.cycle.response_complete:  # whoever receives a body need not wait for it
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
                   **error.headers}
        head = b"HTTP/1.1 %d %b\r\n" % (error.status, STATUS_PHRASES[error.status])
        self.leaving.write(head + "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n"
                           + body)
        self.leaving.close()
