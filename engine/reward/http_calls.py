"""POSTs to one address, bounded in time and in size.

Nothing is read from the environment and no redirect is followed.
"""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from stars.arguments import real, shown
from stars.errors import RequestError, describe

MAX_ANSWER = 16 << 20
"""Bytes of an answer at most; what is longer is refused."""
MAX_PAUSE = 30.0
"""Seconds between two tries at most, but for what a server asks for."""
FIRST_PAUSE = 0.25
MAX_SAID = 200  # characters of what an exception says
TOO_MANY_REQUESTS = 429
VISIBLE = re.compile("[!-~]+")
FORM = {"Content-Type": "application/json", "Accept": "application/json"}
"""Headers of every body."""

logger = logging.getLogger(__name__)


class Address(NamedTuple):
    """Where calls go."""

    scheme: str  # "http" or "https"
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


class Limits(NamedTuple):
    """How long and how often is tried."""

    timeout: float  # seconds of one try, from the connection to the last byte of the answer
    retries: int  # further tries
    total_timeout: float  # seconds of all tries and pauses together


class Answer(NamedTuple):
    """What came back: of any status, but for those that another try may better and that had one left."""

    status: int
    body: bytes


class Failed(NamedTuple):
    """Why there is no answer: the end of a sentence that begins with the address."""

    problem: str


class Poster:
    """Sends bodies to one address. Any thread may call; connections stay open for whoever calls next."""

    def __init__(self, address: Address, headers: Mapping[str, str], limits: Limits):
        self._address, self._headers, self._limits = address, dict(headers), limits
        self._idle: list[_Line] = []
        self._process = os.getpid()

    def __del__(self) -> None:
        for line in self._idle:
            line.close()

    def post(self, body: bytes, deadline: float) -> Answer | Failed:
        """Tries until there is an answer, or no more tries, or until `deadline` on the monotonic clock."""
        limits, problem = self._limits, "was not asked"
        tries = limits.retries + 1
        for number in range(1, tries + 1):
            left = deadline - time.monotonic()
            if left <= 0.0:
                return Failed(f"{problem}, and total_timeout={limits.total_timeout:g} seconds are over")
            seconds, pause = min(left, limits.timeout), min(MAX_PAUSE, FIRST_PAUSE * 2 ** (number - 1))
            try:
                answer, asked = self._try(body, time.monotonic() + seconds)
            except TimeoutError:
                problem = f"did not answer within {seconds:.3g} seconds"
            except _Useless as error:
                return Failed(str(error))
            except ssl.SSLCertVerificationError as error:
                return Failed(f"could not be trusted ({describe(error)[:MAX_SAID]})")
            except (OSError, http.client.HTTPException) as error:
                problem = f"could not be reached, or broke off ({describe(error)[:MAX_SAID]})"
            else:
                if number == tries or answer.status != TOO_MANY_REQUESTS and answer.status < 500:
                    return answer
                problem, pause = f"answered with status {answer.status}", max(pause, asked)
            if number < tries:
                if pause >= deadline - time.monotonic():
                    return Failed(f"{problem}, and total_timeout={limits.total_timeout:g} seconds end before another "
                                  "try")
                logger.info("%s is asked again in %.3g seconds", self._address, pause)
                time.sleep(pause)
        return Failed(problem + (f", {tries} times" if tries > 1 else ""))

    def _try(self, body: bytes, deadline: float) -> tuple[Answer, float]:
        """One try, and the seconds after which the server asks to be tried again."""
        if self._process != os.getpid():  # the connections are the parent's
            self._process, self._idle = os.getpid(), []
        try:
            line = self._idle.pop()
        except IndexError:
            line = _Line(self._address, deadline)
        else:
            try:
                return self._send(line, body, deadline)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                line = _Line(self._address, deadline)  # the server had closed what was kept open: that was no try
        return self._send(line, body, deadline)

    def _send(self, line: _Line, body: bytes, deadline: float) -> tuple[Answer, float]:
        try:
            answer, pause, kept = line.send(self._address.path, body, self._headers, deadline)
        except BaseException:
            line.close()
            raise
        if kept:
            self._idle.append(line)
        else:
            line.close()
        return answer, pause


class _Useless(Exception):
    """An answer that would be no better another time."""


class _Line:
    """A connection. Connecting raises OSError."""

    def __init__(self, address: Address, deadline: float):
        scheme, host, port, _ = address
        seconds = max(0.001, deadline - time.monotonic())
        self._connection = http.client.HTTPConnection(host, port, timeout=seconds) if scheme == "http" else (
            http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl.create_default_context()))
        self._connection.connect()
        self._timed = self._connection.sock = _Timed(self._connection.sock, deadline)

    def send(self, path: str, body: bytes, headers: Mapping[str, str], deadline: float) -> tuple[Answer, float, bool]:
        """The answer, the seconds after which the server asks to be tried again, and whether the connection stays."""
        self._timed.deadline = deadline
        self._connection.request("POST", path, body, dict(headers))
        response = self._connection.getresponse()
        data = response.read(MAX_ANSWER + 1)
        if len(data) > MAX_ANSWER:
            raise _Useless(f"answered with more than {MAX_ANSWER >> 20} MiB")
        if response.length:  # bytes that were announced and did not come
            raise ConnectionResetError("its answer is not whole")
        kept = response.isclosed() and not response.will_close
        return Answer(response.status, data), _seconds(response.headers.get("Retry-After")), kept

    def close(self) -> None:
        """Ends it."""
        self._connection.close()


class _Timed:
    """A socket, all of whose waits end at one moment: a timeout of a socket's own begins anew with every byte."""

    def __init__(self, sock: socket.socket, deadline: float):
        self.sock, self.deadline = sock, deadline

    def arm(self) -> None:
        """Before it waits; TimeoutError where the moment has come."""
        left = self.deadline - time.monotonic()
        if left <= 0.0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)

    def sendall(self, data: bytes) -> None:
        """As a socket's."""
        self.arm()
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """As a socket's, to be read."""
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """As a socket's: what is being read can be read to its end."""
        self.sock.close()


class _Reader(io.RawIOBase):
    """What comes from a `_Timed` socket."""

    def __init__(self, timed: _Timed):
        self._timed = timed
        self._raw = timed.sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Waits for bytes, until the moment has come."""
        self._timed.arm()
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Lets go of the socket."""
        self._raw.close()
        super().close()


def _seconds(header: str | None) -> float:
    """What a Retry-After header asks for; 0 for none, and for a date."""
    try:
        return max(0.0, float(header or 0.0))
    except ValueError:
        return 0.0


# -- what users say of an address, and what a server says of an error -------------------------------------------------


def address_of(name: str, url: Any, path: str, key_from: str) -> Address:
    """Where `path` of the server at `url` is, which may end with it; RequestError, about `name`, for anything but a
    plain address. key_from: what gives a key, in words."""
    advice = 'it must be an address such as "http://127.0.0.1:8000"'
    if not isinstance(url, str) or not VISIBLE.fullmatch(url):
        raise RequestError(f"{name} is {shown(url)}, {advice}")
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
        (host or "").encode("idna")  # as a socket will have it: a UnicodeError is a ValueError
    except ValueError:
        raise RequestError(f"{name} is not an address: {advice}") from None
    if "@" in parts.netloc:  # it is not shown: it may hold a password
        raise RequestError(f"{name} has a user name: give the key by {key_from}")
    if scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise RequestError(f"{name} is {shown(url)}, {advice}")
    before = parts.path.rstrip("/").removesuffix(f"/{path}")
    return Address(scheme, host, port if port is not None else {"http": 80, "https": 443}[scheme], f"{before}/{path}")


def headers_of(name: str, given: Mapping[str, str] | None, key: str | None) -> dict[str, str]:
    """The headers that are nobody's but the user's; RequestError, which shows no value, for what cannot be sent."""
    headers = {}
    if given is not None and not isinstance(given, Mapping):
        raise RequestError(f"{name} is {type(given).__name__}, it must be a dict of texts")
    for header, value in (given or {}).items():
        if not isinstance(header, str) or not re.fullmatch(r"[A-Za-z0-9-]+", header):
            raise RequestError(f"{name} has a name that is none of a header")
        if not isinstance(value, str) or not re.fullmatch("[ -~]+", value):
            raise RequestError(f"{name} has a value of {header} that cannot be sent: give plain text")
        headers[header] = value
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return headers


def extra_of(name: str, given: Mapping[str, Any] | None, reserved: Sequence[str]) -> dict[str, Any]:
    """Further fields of a body; RequestError for those that are the caller's own, or no JSON."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or any(not isinstance(field, str) or field in reserved for field in given):
        raise RequestError(f"{name} must be a dict of fields by name, other than {', '.join(reserved)}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(given)))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} is no JSON ({describe(error)})") from None
    return copied


def seconds_of(name: str, value: Any) -> float:
    """`value` as seconds; RequestError."""
    return real(name, value, "seconds, more than 0 and at most 86400", lambda seconds: 0.0 < seconds <= 86400.0)


def message_of(body: bytes) -> str:
    """What a server says about an error, on one line of visible characters; empty where that cannot be told."""
    try:
        said = json.loads(body)
        said = said.get("error", said)
        if isinstance(said, dict):
            said = said.get("message", said.get("detail", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(str(said).split()))
