"""Requests that are answered in another process: as data on their way there, as an answer on its way back.

`Forward` is an ASGI application whose every request one of several replicas answers. `answered` runs an ASGI
application for one request that came as data, in the replica's process. Neither knows what lies between.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stars.serve.http.errors import ApiError, api_error

logger = logging.getLogger(__name__)

TRIES = 3
"""Replicas that a request may be lost with: one that kills whoever runs it must not go through all of them."""
LEAVING = 2.0
"""Seconds that an application has to notice that nobody waits for its answer."""
ROUTED = 1 << 14
"""Characters of a prompt that a router may look at."""


class Ask(NamedTuple):
    """A request of HTTP as data."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes

    @property
    def prompt(self) -> str:
        """What a router by prefixes compares, never empty: the beginning of the text that the model is given."""
        try:
            given = json.loads(self.body) if self.method == "POST" else None
            text = "".join(_texts(given.get("messages") or given.get("prompt"))) if isinstance(given, dict) else ""
        except (ValueError, RecursionError):
            text = ""
        return text[:ROUTED] or f"{self.method} {self.path}"


def _texts(value: Any) -> Iterable[str]:
    """The texts of a prompt, a message or a list of them; numbers of tokens as texts."""
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        yield from _texts(value.get("content", value.get("text")))
    elif isinstance(value, (str, int)):
        yield value if isinstance(value, str) else f"{value} "


class Head(NamedTuple):
    """How an answer begins; bytes follow."""

    status: int
    headers: list[tuple[bytes, bytes]]

    @property
    def streams(self) -> bool:
        """Whether the body is shown while it is made."""
        return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                   for name, value in self.headers)


async def answered(app: ASGIApp, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
    """What `app` answers: a Head, then the parts of the body. Closed earlier, it tells `app` that the client has gone.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    body: list[Message] = [{"type": "http.request", "body": ask.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    # Of a server of spec_version 2.4, applications wait for `send` to fail once the client has gone: this one cannot.
    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
        "method": ask.method, "path": ask.path, "raw_path": ask.path.encode(), "query_string": ask.query,
        "root_path": "", "headers": list(ask.headers), "client": ask.client, "server": None, "state": {}}
    task = asyncio.ensure_future(app(scope, receive, messages.put))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], [(bytes(name), bytes(value)) for name, value in message["headers"]])
            elif message.get("body"):
                yield bytes(message["body"])
        await task  # raises what the application did
    finally:
        gone.set()
        if not task.done():
            await asyncio.wait({task}, timeout=LEAVING)
            task.cancel()


class Forward:
    """Has each request answered by a replica, and by another one where that is lost before anything was sent.

    answers: begins a request at a replica, and yields what `answered` does there. lost: what it raises where the
        replica is lost.

    A stream begins with its first event; every other answer is sent once it is whole, so that it can be had again. A
    stream that had begun ends with an event that says so.
    """

    def __init__(self, answers: Callable[[Ask], AsyncGenerator[Head | bytes, None]], lost: tuple[type[Exception], ...]):
        self.answers = answers
        self.lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1003})
            return
        ask = await _asked(scope, receive)
        if ask is None:
            return
        for number in range(1, TRIES + 1):
            try:
                await self._answer(ask, send)
                return
            except self.lost as error:
                logger.warning("%s %s: a replica was lost (%s), which makes %d", ask.method, ask.path,
                               type(error).__name__, number)
        raise ApiError(503, f"{TRIES} replicas were lost with this request: try again later", code="replica_lost",
                       headers={"Retry-After": "1"})

    async def _answer(self, ask: Ask, send: Send) -> None:
        """`lost` only where nothing was sent."""
        head, parts, begun, last = Head(500, []), [], False, b""
        try:
            async with aclosing(self.answers(ask)) as items:
                async for item in items:
                    if isinstance(item, Head):
                        head = item
                    elif head.streams:
                        if not begun:
                            await send(_start(head))
                        begun, last = True, item
                        await send({"type": "http.response.body", "body": item, "more_body": True})
                    else:
                        parts.append(item)
        except Exception as error:
            if not begun:
                raise
            logger.warning("%s %s: a stream broke off (%s)", ask.method, ask.path, type(error).__name__)
            told = api_error(error) if not isinstance(error, self.lost) else ApiError(
                503, "the replica was lost in the midst of this stream: ask again", code="replica_lost")
            parts = [b"" if last.endswith(b"\n\n") else b"\n\n",
                     f"data: {json.dumps(told.body())}\n\ndata: [DONE]\n\n".encode()]
        if not begun:
            await send(_start(head))
        await send({"type": "http.response.body", "body": b"".join(parts), "more_body": False})


def _start(head: Head) -> Message:
    return {"type": "http.response.start", "status": head.status, "headers": head.headers}


async def _asked(scope: Scope, receive: Receive) -> Ask | None:
    """None where the client went away before all of its request was there."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
    headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
    return Ask(scope["method"], path or "/", scope["query_string"], headers, scope.get("client"), bytes(body))
