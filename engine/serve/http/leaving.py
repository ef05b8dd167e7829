"""How a connection is closed, so that its client gets the last answer and nobody waits for it for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from stars.serve.http.service import Service

LINGER_SECONDS, LINGER_BYTES = 2.0, 4 << 20
"""How long, and for how much of what it still sends, a client is listened to that was answered before it had sent all:
closed at once, its own system would throw the answer away."""
MOST_LINGERING = 256
"""Connections that may end so; the others are closed at once."""


class Lingering:
    """The connections of a server that are closed but for what their clients still send."""

    count = 0


class Leaving:
    """A transport that is closed so that its client gets the last answer, and that does not wait for ever for it."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, service: Service,
                 lingering: Lingering, is_sending: Callable[[], bool]):
        """is_sending: whether the client may have more to say."""
        self._transport = transport
        self._loop = loop
        self._service = service
        self._lingering = lingering
        self._is_sending = is_sending
        self._thrown = 0  # bytes
        self._timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes, as that timer was set
        self._lingers = False
        self.closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is sent."""
        return self.closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Sends, until it is closed."""
        if not self.closing and data:
            self._transport.write(data)

    def close(self) -> None:
        """Nothing more is sent. What the client still sends is thrown away for a while, if it has not sent all."""
        if self.is_closing():
            return
        self.closing = True
        if self._is_sending() and self._lingering.count < MOST_LINGERING and self._transport.can_write_eof():
            self._lingers = True
            self._lingering.count += 1
            self._transport.write_eof()
            self._transport.resume_reading()
            self._timer = self._loop.call_later(LINGER_SECONDS, self._transport.abort)
        else:
            self._transport.close()
            if self._transport.get_write_buffer_size():
                self.await_reader()

    def await_reader(self) -> None:
        """From now on the client must read on."""
        if self._reader_timer is None:
            self._unread = self._transport.get_write_buffer_size()
            self._reader_timer = self._loop.call_later(self._service.settings.write_seconds, self._look_at_reader)

    def _look_at_reader(self) -> None:
        self._reader_timer = None
        if self._transport.get_write_buffer_size() < self._unread:  # slow, and there
            self.await_reader()
        else:
            self._service.traffic.closed("reader")
            self.abort()

    def reader_reads(self) -> None:
        """It read all but a little."""
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def throw_away(self, data: bytes) -> None:
        """What came behind the end."""
        self._thrown += len(data)
        if self._thrown > LINGER_BYTES:
            self.abort()

    def abort(self) -> None:
        """Ends it at once."""
        self.closing = True
        self._transport.abort()

    def forget(self) -> None:
        """It is gone."""
        self.closing = True
        if self._lingers:
            self._lingers = False
            self._lingering.count -= 1
        self.reader_reads()
        if self._timer is not None:
            self._timer.cancel()
