"""HTTP over plain sockets, for tests that send what no client would; and the whole server in a thread."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from serving_http import SECONDS, in_thread
from stars.serve.http.server import Server, bound_socket
from stars.serve.http.service import Service


class Answer(NamedTuple):
    """What came over a connection."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Of an answer that is one."""
        return json.loads(self.body)["error"]


class Wire:
    """One connection."""

    def __init__(self, place: tuple[str, int], seconds: float = SECONDS):
        self.socket = socket.create_connection(place, seconds)
        self._file = self.socket.makefile("rb")

    def send(self, *parts: bytes | str) -> Wire:
        """Sends what may break off, where the server has closed."""
        for part in parts:
            self.socket.sendall(part.encode() if isinstance(part, str) else part)
        return self

    def answer(self, bodiless: bool = False) -> Answer:
        """The next answer; EOFError where the connection is closed before one."""
        line = self._file.readline()
        if not line:
            raise EOFError
        status = int(line.split()[1])
        headers = self.head()
        if status == 100 or bodiless:
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, b"".join(self.chunks()))
        length = headers.get("content-length")
        return Answer(status, headers, self._file.read() if length is None else self._file.read(int(length)))

    def head(self) -> dict[str, str]:
        """The headers that come next."""
        headers = {}
        while (line := self._file.readline().decode("latin-1").strip()):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return headers

    def chunks(self) -> Iterator[bytes]:
        """The parts of a body, as they come; it may break off."""
        while (line := self._file.readline()):
            if not (size := int(line, 16)):
                self._file.readline()
                return
            yield self._file.read(size)
            self._file.readline()
        raise EOFError

    def ended(self) -> bool:
        """Whether the server closes without another byte."""
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        """Goes away."""
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def request(path: str, body: Any = None, *headers: str, method: str | None = None, version: str = "1.1") -> bytes:
    """A request as bytes; a body that is no bytes as JSON."""
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/{version}", "Host: localhost", *headers]
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def events(chunks: Iterator[bytes]) -> Iterator[Any]:
    """The events of a stream as JSON, "[DONE]" as it is; EOFError where it breaks off."""
    held = b""
    for chunk in chunks:
        held += chunk
        while b"\n\n" in held:
            line, _, held = held.partition(b"\n\n")
            text = line.decode().removeprefix("data: ")
            yield text if text == "[DONE]" else json.loads(text)


class Place(NamedTuple):
    """Where a server listens."""

    address: tuple[str, int]
    service: Service
    server: Server

    def ask(self, *given: Any, **options: Any) -> Answer:
        """One request over a connection of its own."""
        with Wire(self.address) as wire:
            return wire.send(request(*given, **options)).answer()

    def metric(self, line: str) -> float:
        """The value of a sample in /metrics; 0 where there is none yet."""
        text = self.ask("/metrics", None, *[f"Authorization: Bearer {key}" for key in
                                            self.service.settings.api_keys[:1]]).body.decode()
        found = [row.rpartition(" ")[2] for row in text.splitlines() if row.startswith(line + " ")]
        return float(found[0]) if found else 0.0


@contextmanager
def place_of(service: Service) -> Iterator[Place]:
    """The server of `stars serve` in a thread, which ends when the block is left, with its engine."""
    listening = bound_socket("127.0.0.1", 0)
    server = Server(service, listening)
    with in_thread(server):
        try:
            yield Place(listening.getsockname(), service, server)
        finally:
            server.drain()
