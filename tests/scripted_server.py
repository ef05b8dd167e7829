"""A server in this process that answers each request by a script: bytes and pauses, and when each byte was written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

STREAM = "text/event-stream; charset=utf-8"
Step = bytes | float | None  # what is written, a pause in seconds, or the connection's end


class Asked(NamedTuple):
    """One request as it came, and the moments at which parts of its answer were written."""

    head: str
    body: Any
    at: float
    written: list[float]


class ScriptedServer:
    """Answers POSTs by `script(index)`, and GETs with one model's name."""

    def __init__(self, script: Callable[[int], Sequence[Step]]):
        self.script = script
        self.asked: list[Asked] = []
        self.connections = self.under_way = self.most_under_way = 0
        self.models: bytes = reply(200, {"data": [{"id": "toy"}]})

    @contextlib.asynccontextmanager
    async def running(self):
        """Listens on a free port; yields its address."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._answer(reader, writer):
                pass
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; False where the connection is to end."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(line.split(":")[1]) for line in head.splitlines()
                       if line.lower().startswith("content-length:")), 0)
        body = await reader.readexactly(length)
        if head.startswith("GET"):
            writer.write(self.models)
            return True
        asked = Asked(head, json.loads(body), time.perf_counter(), [])
        self.asked.append(asked)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for step in self.script(len(self.asked) - 1):
                if step is None:
                    return False
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    asked.written.append(time.perf_counter())
                    writer.write(step)
                    await writer.drain()
        finally:
            self.under_way -= 1
        return True


def reply(status: int, payload: Any, **headers: str) -> bytes:
    """A whole answer of JSON."""
    data = json.dumps(payload).encode()
    lines = [f"HTTP/1.1 {status} Because", "Content-Type: application/json", f"Content-Length: {len(data)}",
             *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def head(content_type: str = STREAM) -> bytes:
    """What an answer of unknown length begins with."""
    return f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


def chunk(data: bytes) -> bytes:
    """A piece of its body; of nothing it is the end."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(payload: Any) -> bytes:
    """One event."""
    return f"data: {payload if isinstance(payload, str) else json.dumps(payload)}\n\n".encode()


def text(words: str, finish_reason: str | None = None, **stars: Any) -> bytes:
    """The event of a completion's piece of text."""
    return event({"choices": [{"index": 0, "text": words, "finish_reason": finish_reason,
                               **({"stars": stars} if stars else {})}]})


def usage(prompt: int, completion: int) -> bytes:
    """The event that says how many tokens there were."""
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def stream(pauses: Sequence[float], prompt: int = 7, completion: int = 8, **stars: Any) -> Iterator[Step]:
    """A whole answer: a piece of text after each of the pauses, the counts, the end."""
    yield head()
    for index, pause in enumerate(pauses):
        yield pause
        last = index == len(pauses) - 1
        yield chunk(text(f"{index} ", "length" if last else None, **(stars if last else {})))
    yield chunk(usage(prompt, completion)) + chunk(event("[DONE]")) + chunk(b"")
