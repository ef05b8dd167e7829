"""A server's application in this process: what a client sends it, whole answers, events, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import stars
from stars.serve.http.app import build_app
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings

LIMIT = 60  # seconds; what takes longer hangs


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_constant=lambda text: pytest_fail(text))

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, which has ended as it must."""
        assert self.headers["content-type"].startswith("text/event-stream"), self.body
        *events, done, rest = self.body.decode().split("\n\n")
        assert done == "data: [DONE]" and not rest, self.body[-300:]
        return [json.loads(event.removeprefix("data: "), parse_constant=pytest_fail) for event in events]


def pytest_fail(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


class Server:
    """An application over an engine."""

    def __init__(self, engine: stars.Engine, max_waiting: int | None = 64, **settings: Any):
        self.engine = stars.AsyncEngine(engine, max_waiting=max_waiting)
        self.service = Service(self.engine, ServerSettings(**{"model": "toy", **settings}))
        self.app = build_app(self.service)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        """The answer to one request; `body` may be bytes."""
        return run(self.sent(path, body, headers))

    async def sent(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        """As `post`, for many at once."""
        client = Client(self.app, path, body, headers)
        await client.run()
        return client.answer

    def close(self) -> None:
        run(self.engine.shutdown(drain=False))


class Client:
    """One client, that may go away: `leaves` is told of each message that is sent to it, and says when."""

    def __init__(self, app: Any, path: str, body: Any, headers: Mapping[str, str] | None = None,
                 leaves: Callable[[bytes], bool] = lambda so_far: False):
        self._app = app
        self._leaves = leaves
        self._body = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json", "host": "testserver"} | dict(headers or {})
        self._scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
                       "method": "POST", "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
                       "query_string": b"", "client": ("127.0.0.1", 1), "server": ("testserver", 80),
                       "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()]}
        self.gone = asyncio.Event()
        self.messages: list[dict[str, Any]] = []
        self._asked = False

    async def run(self) -> None:
        await asyncio.wait_for(self._app(self._scope, self._receive, self._send), LIMIT)

    @property
    def answer(self) -> Answer:
        start = self.messages[0]
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers, self.sent_body)

    @property
    def sent_body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if self._leaves(self.sent_body):
            self.gone.set()
            await asyncio.sleep(0)


def run(awaitable: Awaitable) -> Any:
    async def within() -> Any:
        return await asyncio.wait_for(awaitable, LIMIT)

    return asyncio.run(within())
