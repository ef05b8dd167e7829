"""One request over HTTP, and what its stream says, event by event."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from stars.bench.answers import Answer
from stars.bench.sse import EventParser
from stars.errors import RequestError

KEEPALIVE = 2.0
"""Seconds that a connection is kept for the next request: fewer than any server does, so that none is closed while a
request is on its way."""
SHOWN = 160  # characters of an error
MOST_READ = 1 << 20  # bytes of an answer that is no stream
TIMEOUT = asyncio.exceptions.TimeoutError  # another class than the built-in one before Python 3.11


class Client:
    """Requests to one endpoint, timed from `start`, a time of time.perf_counter."""

    def __init__(self, base_url: str, endpoint: str, timeout: float, api_key: str | None = None):
        base = base_url.rstrip("/").removesuffix("/v1")  # OpenAI's clients are given the address with it
        self.url = base + endpoint
        self.models_url = base + "/v1/models"
        self.start = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE), headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=timeout))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def first_model(self) -> str:
        """The first name of /v1/models; RequestError where there is none to be had."""
        try:
            async with self._session.get(self.models_url) as response:
                status, body = response.status, await _beginning(response)
        except (aiohttp.ClientError, TIMEOUT) as error:
            raise RequestError(f"{self.models_url} cannot be asked for a model ({_words(error)}): is a server "
                               "there?") from error
        if status != 200:
            advice = "--api-key-env VAR" if status in (401, 403) else "--model NAME"
            raise RequestError(f"{self.models_url} answers {status} ({_message(body)}): give {advice}")
        try:
            name = json.loads(body)["data"][0]["id"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RequestError(f"{self.models_url} names no model: give --model NAME") from error
        return str(name)

    async def send(self, body: bytes, answer: Answer) -> None:
        """Sends one request now and notes in `answer` what becomes of it; raises nothing of it."""
        answer.sent = self._now()
        try:
            async with self._session.post(self.url, data=body) as response:
                answer.status = response.status
                if response.status != 200:
                    answer.retry_after = "Retry-After" in response.headers
                    answer.error = f"{response.status}: {_message(await _beginning(response))}"
                elif response.content_type != "text/event-stream":
                    answer.error = f"the answer is no event stream, but {response.content_type}"
                else:
                    await self._read(response, answer)
        except TIMEOUT:
            answer.error = "timeout"
        except aiohttp.ClientError as error:
            answer.error = _words(error)
        finally:
            answer.ended = answer.ended or self._now()

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        """Reads a stream to its end, which [DONE] is, or a finish_reason where a server sends none."""
        parser, done, told = EventParser(), False, None
        try:
            async for piece in response.content.iter_any():
                now = self._now()
                for data in parser.feed(piece):
                    if data == "[DONE]":
                        done, answer.ended = True, answer.ended or now
                    elif not done:
                        told = self._event(data, answer, now) or told
        except (aiohttp.ClientError, TIMEOUT):
            if not done:
                raise
        except ValueError as error:  # an event that does not end
            told, done = told or str(error), True
        whole = done or answer.finish_reason is not None
        answer.error = told or (None if whole else "the stream broke off")

    def _event(self, data: str, answer: Answer, now: float) -> str | None:
        """Takes in one event; what it says of an error."""
        try:
            event = json.loads(data)
            if event.get("error"):
                return f"in the stream: {_message(data.encode())}"
            usage = event.get("usage")
            if usage:
                answer.input_tokens = _count(usage.get("prompt_tokens"), answer.input_tokens)
                answer.output_tokens = _count(usage.get("completion_tokens"), answer.output_tokens)
            text = ""
            for choice in event.get("choices") or ():
                text += _text_of(choice)
                reason = choice.get("finish_reason")
                answer.finish_reason = str(reason) if reason else answer.finish_reason
                answer.stars |= choice.get("stars") or {}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return f"an event that is no completion: {data[:SHOWN]}"
        if text:
            answer.text += text
            answer.times.append(now)
        return None

    def _now(self) -> float:
        return time.perf_counter() - self.start


def _text_of(choice: Mapping[str, Any]) -> str:
    """What a choice brings: of a chat what the model thinks, too."""
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    return (delta.get("content") or "") + (delta.get("reasoning_content") or delta.get("reasoning") or "")


def _count(value: Any, before: int | None) -> int | None:
    """A number of tokens; `before` where nothing is said. TypeError for what is none."""
    if value is None:
        return before
    if type(value) is not int or value < 0:
        raise TypeError("no number of tokens")
    return value


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """An answer's body, or as much of it as is looked at: the connection is not used again then."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) >= MOST_READ:
            response.close()
            break
    return bytes(body[:MOST_READ])


def _message(body: bytes) -> str:
    """What an error's body says, in one line."""
    text = body.decode("utf8", "replace")
    try:
        found = json.loads(text)
        for key in ("error", "detail", "message"):
            found = found.get(key, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        pass
    return " ".join(text.split())[:SHOWN]


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(": ")[:SHOWN]
