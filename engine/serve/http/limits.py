"""What stands between a connection and the handlers: who may ask, how much, and how many at once. Pure ASGI, so that
streams pass as they are.

From the outside in: `Counted`, `Hosts`, CORS where origins are given, `Keys`, `Places`, `Bodies`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stars.arguments import shown
from stars.serve.http import draws
from stars.serve.http.errors import ApiError, api_error, shutting_down
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings

logger = logging.getLogger(__name__)
request_log = logging.getLogger("stars.serve.requests")
"""One line a request, where that was asked for: what it was, how it ended and how long it took, nothing of its text."""

OPEN = frozenset({"/", "/health", "/ready"})
"""What needs no key: the page, which has no secrets, and what load balancers ask. /metrics tells who does how much."""
READS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that ask for no work of the models."""
BODIES = 256
"""Bodies of the largest size that may be in the midst of being received."""
HEAD_BYTES = 1 << 16
"""Of a request, at most. h11 has a bound of its own, and keeps to it only where a head comes in parts."""
MOST_LINES = 256  # of a head
CLOSE = {"Connection": "close"}
VERSIONS = ("1.0", "1.1", "2", "3")  # of HTTP, as servers of ASGI name them; h11 lets any number pass
GONE = 499
REQUEST_ID = "X-Request-Id"
MAX_REQUEST_ID = 128  # characters of a client's own


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with `error`, and closes the connection where the request's body was not read."""
    headers = dict(error.headers)
    if has_body(scope):
        headers |= CLOSE
    await JSONResponse(error.body(), error.status, headers)(scope, receive, send)


def has_body(scope: Scope) -> bool:
    """Whether a request says that it has one."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip() != "0"


class Counted:
    """Counts requests, gives each an id, says so in the log where it is asked to, and answers for handlers that raise.

    So an exception ends one request, and the server logs it once.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, over, gone = time.monotonic(), 0, False, False
        request_id = _id(Headers(scope=scope))
        state = scope.setdefault("state", {})
        traffic = self.service.traffic

        async def received() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def sent(message: Message) -> None:
            nonlocal status, over
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                if status == 429:
                    headers.setdefault("Retry-After", str(traffic.retry_after()))
            elif message["type"] == "http.response.body":
                over = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, received, sent)
        except Exception as error:
            if status:  # who reads must see that this is no whole answer: the server closes the connection
                raise
            told = api_error(error)
            if not isinstance(error, ApiError):  # which somebody foresaw, in an application that has no handler of them
                logger.error("%s %s failed", scope["method"], shown(scope["path"]), exc_info=error)
            await refuse(told, scope, receive, sent)
        except asyncio.CancelledError:  # the server ends before a round of the engine's does
            if status:
                raise
            await refuse(shutting_down(traffic.retry_after()), scope, receive, sent)
        finally:
            seconds = time.monotonic() - begin
            route = getattr(scope.get("route"), "path", "other")
            told_status = GONE if gone and not over else status or 500
            traffic.answered(scope["method"], route, told_status, seconds)
            if self.service.settings.log_requests:
                counts = state.get("counts", dict)()  # of what a handler counted, by names
                request_log.info("%s %s %s %d %.3fs%s", request_id, scope["method"], route, told_status, seconds,
                                 "".join(f" {name}={value}" for name, value in counts.items()))


def _id(headers: Headers) -> str:
    """What the request is called: as its client calls it, where that can stand in a header and a log line, else by a
    name of ours."""
    given = headers.get(REQUEST_ID, "")
    return given if 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable() else draws.name()


class Hosts:
    """Refuses requests that name another host, as pages do whose own name was pointed at this one, and what pages of
    other origins send without asking first."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self.app = app
        self.hosts = frozenset(host.lower().strip("[]") for host in settings.allowed_hosts)
        if "*" in self.hosts:
            self.hosts = frozenset()
        self.origins = frozenset(origin.lower().rstrip("/") for origin in settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope, Headers(scope=scope)) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await refuse(problem, scope, receive, send)

    def _problem(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = headers.get("host")
        if scope.get("http_version", "1.1") not in VERSIONS:
            return ApiError(505, "this server speaks HTTP/1.1: ask in that", code="bad_http", headers=CLOSE)
        if "transfer-encoding" in headers and "content-length" in headers:  # two servers may read two bodies of it
            return ApiError(400, "the request has a Content-Length and a Transfer-Encoding: send one of them",
                            code="bad_http", headers=CLOSE)
        if len(scope["headers"]) > MOST_LINES:
            return ApiError(431, f"the request has more than {MOST_LINES} headers: send fewer", code="bad_http",
                            headers=CLOSE)
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope.get("raw_path") or b"") + len(
                scope["query_string"]) > HEAD_BYTES:
            return ApiError(431, f"the request's head has more than {HEAD_BYTES} bytes: send less", code="bad_http",
                            headers=CLOSE)
        if self.hosts and host is not None and _name(host) not in self.hosts:
            return ApiError(400, "this server does not go by the name in the Host header: ask it by another, or start "
                            "it with --allowed-host NAME", code="unknown_host")
        origin = headers.get("origin", "").lower()
        if origin and scope["method"] not in READS and "*" not in self.origins and origin not in self.origins and (
                host is None or _place(origin) != host.lower()):
            return ApiError(403, "pages of other origins may not ask this server: start it with --cors-origin ORIGIN",
                            code="foreign_origin")
        return None


def _name(host: str) -> str | None:
    """The host's name without a port; None where it is none."""
    try:
        return urlsplit("//" + host.lower()).hostname if not set("@/?#\\") & set(host) else None
    except ValueError:
        return None


def _place(origin: str) -> str | None:
    """Host and port of an origin; None where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


class Keys:
    """Asks for an API key. What is compared are digests, all of them, each in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self.digests = [_digest(key.encode("ascii")) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.digests and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            number = self._number(Headers(scope=scope).get("authorization", ""))
            if number is None:
                error = ApiError(401, "an API key is needed that this server knows: send it as Authorization: Bearer "
                                 "KEY", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await refuse(error, scope, receive, send)
                return
            if len(self.digests) > 1:  # users of one key are not those of another
                scope.setdefault("state", {})["client"] = f"key{number}"
        await self.app(scope, receive, send)

    def _number(self, given: str) -> int | None:
        """Which key it is, from 1 on."""
        scheme, _, key = given.partition(" ")
        digest = _digest(key.strip().encode("latin-1"))
        found = [hmac.compare_digest(digest, known) for known in self.digests]
        return found.index(True) + 1 if scheme.lower() == "bearer" and any(found) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Places:
    """Lets requests of the API in, as many at once as may be, and none once the server shuts down."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READS:
            await self.app(scope, receive, send)
            return
        traffic, most = self.service.traffic, self.service.settings.max_concurrent_requests
        try:
            self.service.check_open()
            if traffic.under_way >= most:
                raise ApiError(429, f"{most} requests are under way already, as many as may be: try again later",
                               code="too_many_requests")
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        traffic.under_way += 1
        try:
            await self.app(scope, receive, send)
        finally:
            traffic.under_way -= 1
            traffic.ended()


class Bodies:
    """Receives a request's body before anything is made of it: not more than may be, and not for longer."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._received(Headers(scope=scope), receive)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)

    async def _received(self, headers: Headers, receive: Receive) -> bytes | None:
        settings, traffic = self.service.settings, self.service.traffic
        most = settings.max_body_bytes
        too_long = ApiError(413, f"the body has more than {most} bytes, the most that this server takes: send less, or "
                            "start it with a higher --max-body-bytes", code="body_too_large")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 20 or int(length) > most):
            raise too_long
        body, until = bytearray(), time.monotonic() + settings.body_seconds
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
                except asyncio.TimeoutError:  # noqa: UP041 (another one in Python 3.10)
                    raise ApiError(408, f"the body did not come within {settings.body_seconds:g} s: send it faster",
                                   code="body_timeout") from None
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                if len(body) + len(part) > most:
                    raise too_long
                if traffic.buffered + len(part) > BODIES * most:
                    raise ApiError(503, "too many long bodies are on their way: try again later", code="bodies",
                                   headers={"Retry-After": str(traffic.retry_after())})
                body += part
                traffic.buffered += len(part)
                if not message.get("more_body", False):
                    return bytes(body)
        finally:
            traffic.buffered -= len(body)
