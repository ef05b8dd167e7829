"""Requests that another process answers: what goes there and back, and what is tried again where it is lost."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from stars.exposition import merged
from stars.serve.forward import ROUTED, TRIES, Ask, Forward, Head, answered
from stars.serve.http.errors import ApiError
from stars.serve.http.server import bound_socket

EVENTS = Head(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
JSON = Head(200, [(b"content-type", b"application/json")])
ASK = Ask("POST", "/v1/completions", b"", ((b"host", b"here"),), ("10.0.0.1", 5), b'{"prompt": "Hi"}')


class Lost(Exception):
    """A replica's end."""


def forwarded(*tries, scope=()):
    """What a client is sent where the tries of its request go like this, and how many there were: items that a replica
    yields and, at their end, what it raises."""
    calls: list[Ask] = []
    sent: list[dict] = []

    async def answers(ask):
        calls.append(ask)
        for item in tries[len(calls) - 1]:
            if isinstance(item, Exception):
                raise item
            yield item

    async def receive():
        return {"type": "http.request", "body": ASK.body, "more_body": False}

    async def send(message):
        sent.append(message)

    asked = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": "",
             "headers": [[b"host", b"here"]], "client": ("10.0.0.1", 5)} | dict(scope)
    error = None
    try:
        asyncio.run(Forward(answers, (Lost,))(asked, receive, send))
    except Exception as raised:
        error = raised
    starts = [message["status"] for message in sent if message["type"] == "http.response.start"]
    body = b"".join(message.get("body", b"") for message in sent)
    assert error or sent[-1] == {"type": "http.response.body", "body": sent[-1]["body"], "more_body": False}
    return starts, body, calls, error


def test_an_answer_comes_as_the_replica_gave_it():
    starts, body, calls, _ = forwarded([JSON, b"{", b"}"])
    assert (starts, body, calls) == ([200], b"{}", [ASK])
    starts, body, calls, _ = forwarded([EVENTS, b"data: 1\n\n", b"data: [DONE]\n\n"])
    assert (starts, body, len(calls)) == ([200], b"data: 1\n\ndata: [DONE]\n\n", 1)


@pytest.mark.parametrize("lost", [[Lost()], [JSON, Lost()], [JSON, b'{"half', Lost()], [EVENTS, Lost()]])
def test_what_was_lost_before_anything_was_sent_is_had_from_another_replica(lost):
    starts, body, calls, _ = forwarded(lost, [JSON, b"{}"])
    assert (starts, body, calls) == ([200], b"{}", [ASK, ASK])


@pytest.mark.parametrize("last", [b"data: 1\n\n", b"data: 1"])
def test_a_stream_that_had_begun_ends_with_an_error(last):
    starts, body, calls, _ = forwarded([EVENTS, last, Lost()])
    first, error, done, rest = body.decode().split("\n\n")
    assert (starts, first, done, rest, len(calls)) == ([200], "data: 1", "data: [DONE]", "", 1)
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_stream_whose_application_raised_ends_with_an_error_that_gives_nothing_away():
    _, body, calls, _ = forwarded([EVENTS, b"data: 1\n\n", RuntimeError("a secret")])
    assert b'"type": "server_error"' in body and b"secret" not in body and len(calls) == 1


def test_a_request_that_kills_whoever_runs_it_ends():
    starts, body, calls, error = forwarded(*[[Lost()]] * (TRIES + 1))
    assert isinstance(error, ApiError) and (error.status, error.code) == (503, "replica_lost")
    assert (starts, body, len(calls)) == ([], b"", TRIES)


def test_other_errors_are_not_tried_again():
    _, _, calls, error = forwarded([ApiError(429, "full")], [JSON, b"{}"])
    assert isinstance(error, ApiError) and error.status == 429 and len(calls) == 1


def test_the_prefix_of_a_route_is_not_the_replicas_business():
    for root, path in (("/stars", "/stars/v1/models"), ("/", "/v1/models"), ("", "/v1/models")):
        _, _, [ask], _ = forwarded([JSON], scope={"root_path": root, "path": path})
        assert ask.path == "/v1/models"


def test_who_speaks_websocket_is_turned_away():
    async def receive():
        raise AssertionError("nothing is read")

    async def answers(ask):
        raise AssertionError("nobody is asked")
        yield

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Forward(answers, (Lost,))({"type": "websocket", "path": "/"}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("body, prompt", [
    ({"prompt": "Hi"}, "Hi"), ({"prompt": ["a", "b"]}, "ab"), ({"prompt": [1, 23]}, "1 23 "),
    ({"messages": [{"role": "user", "content": "Hi"}, {"content": [{"type": "text", "text": "you"}]}]}, "Hiyou"),
    ({"prompt": ""}, "POST /v1/completions"), ({"prompt": {"a": 1}}, "POST /v1/completions"),
    ([1], "POST /v1/completions"), ({"messages": 5}, "5 "), ({"prompt": "é" * 2 * ROUTED}, "é" * ROUTED)])
def test_routers_see_the_beginning_of_the_prompt_and_never_nothing(body, prompt):
    assert ASK._replace(body=json.dumps(body).encode()).prompt == prompt


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_routers_see_something_of_broken_bodies(body):
    assert ASK._replace(body=body).prompt == "POST /v1/completions"


async def echo(scope, receive, send):
    """Tells what it was asked."""
    message = await receive()
    told = {"path": scope["path"], "query": scope["query_string"].decode(), "method": scope["method"],
            "client": scope["client"], "body": message["body"].decode(), "more": message["more_body"]}
    await send({"type": "http.response.start", "status": 201, "headers": [[b"a", b"b"]]})
    await send({"type": "http.response.body", "body": json.dumps(told).encode(), "more_body": True})
    await send({"type": "http.response.body"})


async def everything(app):
    return [item async for item in answered(app, ASK)]


def test_an_application_is_asked_what_was_asked():
    head, body = asyncio.run(everything(echo))
    assert head == Head(201, [(b"a", b"b")])
    assert json.loads(body) == {"path": "/v1/completions", "query": "", "method": "POST", "client": ["10.0.0.1", 5],
                                "body": '{"prompt": "Hi"}', "more": False}


def test_what_an_application_raises_is_raised():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("x")

    with pytest.raises(ValueError, match="^x$"):
        asyncio.run(everything(app))


@pytest.mark.parametrize("deaf", [False, True])
def test_an_application_hears_that_its_client_has_gone(deaf, monkeypatch):
    """One that listens ends by itself; one that does not is cancelled."""
    monkeypatch.setattr("stars.serve.forward.LEAVING", 0.05)
    ends: list[str] = []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            if not deaf:
                ends.append((await receive())["type"])
            await asyncio.sleep(60 * deaf)
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async def leave():
        items = answered(app, ASK)
        async for _ in items:
            break
        await items.aclose()
        await asyncio.sleep(0.01)
        return list(ends)

    assert asyncio.run(asyncio.wait_for(leave(), 10)) == (["cancelled"] if deaf else ["http.disconnect"])


def test_metrics_of_several_stand_together():
    text = '# HELP a A.\n# TYPE a gauge\na{r="%s"} 1\n# HELP b B.\n# TYPE b histogram\nb_sum{r="%s"} 2\n'
    assert merged([text % ("x", "x"), text % ("y", "y")]).splitlines() == [
        "# HELP a A.", "# TYPE a gauge", 'a{r="x"} 1', 'a{r="y"} 1',
        "# HELP b B.", "# TYPE b histogram", 'b_sum{r="x"} 2', 'b_sum{r="y"} 2']
    assert merged([]) == ""


def test_what_the_server_writes_goes_out_at_once():
    """Else answers wait for the client's system to acknowledge their heads: some 40 ms."""
    async def accepted():
        found = asyncio.get_running_loop().create_future()
        with bound_socket("127.0.0.1", 0) as listening:
            server = await asyncio.start_server(lambda reader, writer: found.set_result(writer), sock=listening)
            _, client = await asyncio.open_connection(*listening.getsockname())
            writer = await asyncio.wait_for(found, 10)
            at_once = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for one in (client, writer, server):
                one.close()
        return at_once

    assert asyncio.run(accepted()) != 0
