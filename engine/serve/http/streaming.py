"""Server-sent events, several requests' outputs as one stream, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stars.outputs import RequestOutput
from stars.serve.async_engine import RequestStream
from stars.serve.http.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumped(value: Any) -> bytes:
    """Strict JSON."""
    return _ENCODER.encode(value).encode()


def event(value: Any) -> bytes:
    """One event."""
    return b"data: " + dumped(value) + b"\n\n"


class EventStream(Response):
    """Events as they come. Who goes away ends the generator, also while it awaits something."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]):
        self._events = events
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for one in events:
                await send({"type": "http.response.body", "body": one, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def merged(streams: list[RequestStream]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """The outputs of several requests as they come, each with the number of its request. Nobody is read ahead of."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    ready: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(1)

    async def read(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                await ready.put((index, output))
        except Exception as error:
            await ready.put(error)
        else:
            await ready.put(None)

    readers = [asyncio.ensure_future(read(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(readers)
        while left:
            one = await ready.get()
            if isinstance(one, Exception):
                raise one
            if one is None:
                left -= 1
            else:
                yield one
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; where the client goes away first, it is cancelled, and None returned once it has ended."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        left = [one for one in (task, gone) if one.cancel()]
        if left:
            await asyncio.wait(left)


def client_closed() -> ApiError:
    """What nobody hears any more: for the log."""
    return ApiError(499, "the client has gone away", code="client_closed_request")


async def _gone(receive: Receive) -> None:
    """Returns once the client has gone. The body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
