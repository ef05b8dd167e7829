"""The HTTP server in a thread, for tests with clients that open sockets."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

import stars
from stars.cli.options import shipped_pair
from stars.serve.http.server import Server, address, bound_socket
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings

SECONDS = 30.0
"""After which something that a test waits for does not come any more."""
STEP = 0.005


class Running(NamedTuple):
    """A server that listens."""

    url: str  # http://127.0.0.1:PORT
    service: Service

    @property
    def engine(self) -> stars.Engine:
        """What decodes."""
        return self.service.engine.engine

    @property
    def held(self) -> int:
        """Requests that the engine has not finished, and pages of its cache that are not free."""
        engine = self.engine
        return len(engine._requests) + engine._cache.num_pages - engine._cache.num_free_pages


class _Lent(Server):
    """A server that leaves its engine to others."""

    async def shutdown(self, sockets: Any = None) -> None:
        await uvicorn.Server.shutdown(self, sockets)


@contextmanager
def running_server(service: Service) -> Iterator[Running]:
    """`service` on a free port of the loopback address, until the block is left; the engine stays."""
    with contextlib.closing(bound_socket("127.0.0.1", 0)) as listening, in_thread(_Lent(service, listening)):
        yield Running(address(listening), service)


@contextmanager
def in_thread(server: Server) -> Iterator[None]:
    """Runs it until the block is left."""
    thread = threading.Thread(target=server.start, name="server", daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert thread.is_alive(), "the server did not start"
        yield
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server does not end"


@contextmanager
def service_of_pair(settings: ServerSettings | None = None, max_waiting: int | None = None,
                    **options: Any) -> Iterator[Service]:
    """The shipped pair, or `options` of Engine instead, behind an API; shut down when the block is left."""
    lm, rm = shipped_pair()
    options = {"model": lm, "reward": rm, "max_num_seqs": 8, "cache_tokens": 4096, **options}
    engine = stars.AsyncEngine(options.pop("model"), max_waiting=max_waiting, **options)
    try:
        yield Service(engine, settings if settings is not None else ServerSettings("tiny"))
    finally:
        asyncio.run(engine.shutdown(drain=False))


def chat_pair(directory: Path) -> dict[str, Any]:
    """Options of Engine: the shipped pair, whose language model, in DIRECTORY, has got a chat template."""
    lm, rm = shipped_pair()
    shutil.copytree(lm, directory)
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    return {"model": directory, "reward": stars.CausalReward(rm, template="raw")}


def wait_until(true: Callable[[], Any], seconds: float = SECONDS) -> float:
    """Seconds until `true()`; AssertionError where that is never."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < seconds, "what was waited for does not come"
        time.sleep(STEP)
    return time.monotonic() - begin
