"""A small HTTP server that answers like vLLM's, or otherwise: what remote rewards are tested against."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def reward_of(text: str) -> float:
    """What the server says of a text: some number between -4 and 4 that depends on every letter."""
    return sum(place * ord(letter) for place, letter in enumerate(text, 1)) % 97 / 12.0 - 4.0


def text_of(body: dict[str, Any]) -> list[str]:
    """The texts of a body; messages are written with their roles."""
    if "messages" in body:
        return ["".join(f"<{turn['role']}>{turn['content']}" for turn in body["messages"])]
    return body["input"]


class Handler(BaseHTTPRequestHandler):
    """Does what the server's script says, one line a call, and then what it usually does."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for 40 ms behind its headers

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.paths.append(self.path)
            server.headers.append(dict(self.headers))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            behave = server.script.pop(0) if server.script else server.usual
        try:
            behave(self, body)
        except (BrokenPipeError, ConnectionResetError):  # whoever asked did not wait
            pass
        finally:
            with server.lock:
                server.busy -= 1

    def reply(self, payload: Any, status: int = 200, **headers: str) -> None:
        """An answer of JSON, or of bytes as they are."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


Behaviour = Callable[[Handler, dict[str, Any]], None]


def classify(handler: Handler, body: dict[str, Any]) -> None:
    """What vLLM's /classify says, the last text first."""
    items = [{"index": index, "label": "LABEL_0", "probs": [reward_of(text)], "num_classes": 1}
             for index, text in enumerate(text_of(body))]
    handler.reply({"id": "classify-1", "object": "list", "model": "rm", "data": items[::-1]})


def pooling(handler: Handler, body: dict[str, Any]) -> None:
    """What vLLM's /pooling says of a model with one number a text."""
    handler.reply({"object": "list", "data": [{"index": index, "object": "pooling", "data": [reward_of(text)]}
                                              for index, text in enumerate(text_of(body))]})


def by_token(handler: Handler, body: dict[str, Any]) -> None:
    """The same of a model with a number for each token."""
    handler.reply({"data": [{"index": index, "data": [[9.0], [-9.0], [reward_of(text)]]}
                            for index, text in enumerate(text_of(body))]})


def says(payload: Any, status: int = 200, **headers: str) -> Behaviour:
    """Always this answer."""
    return lambda handler, body: handler.reply(payload, status, **headers)


def items(*values: Any, first: int = 0) -> dict[str, Any]:
    """An answer of /classify with these numbers."""
    return {"data": [{"index": index, "probs": value if isinstance(value, list) else [value]}
                     for index, value in enumerate(values, first)]}


def late(seconds: float) -> Behaviour:
    """The usual, later."""
    def behave(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        classify(handler, body)
    return behave


def hangs_up(handler: Handler, body: dict[str, Any]) -> None:
    """No answer."""
    handler.close_connection = True


def breaks_off(handler: Handler, body: dict[str, Any]) -> None:
    """Less than it announced."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')
    handler.close_connection = True


def drips(handler: Handler, body: dict[str, Any]) -> None:
    """A byte now and then: each comes soon enough, all of them do not."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.03)
    handler.close_connection = True


@contextmanager
def serving(usual: Behaviour = classify, *script: Behaviour) -> Iterator[Any]:
    """A server, at `.url`, which notes what it was sent."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.lock = threading.Lock()
    server.usual, server.script = usual, list(script)
    server.bodies, server.paths, server.headers = [], [], []
    server.connections = server.busy = server.busiest = 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
