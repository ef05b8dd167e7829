"""Who may ask a server: keys, hosts, origins. What it says of itself. What happens where something in it breaks."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

import stars
from serving_http import service_of_pair, wait_until
from stars.exposition import Family
from stars.serve.http.errors import ApiError
from stars.serve.http.limits import Counted
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings
from stars.serve.http.traffic import Traffic
from test_serve_edge import COMPLETION, LONG, is_free, set_to, text_of
from wire import Place, Wire, events, place_of, request

pytestmark = pytest.mark.usefixtures("one_torch_thread")

KEYS = ("first-key", "second-key")


class Reward:
    """A callable that can be told to fail."""

    fails = False

    def __call__(self, prompt, responses):
        if self.fails:
            raise RuntimeError("a secret of the server's")
        return [float(len(response)) for response in responses]


REWARD = Reward()
SLOW = LONG | {"max_tokens": 400, "n": 8, "stars": {"reward_threshold": 99.0, "segment_size": 1, "max_attempts": 8}}
"""Seconds of work."""


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    settings = ServerSettings("lm", api_keys=KEYS, allowed_hosts=("localhost", "::1"), drain_seconds=0.0,
                              cors_origins=("https://friend.example",))
    with service_of_pair(settings, reward=stars.FunctionReward(REWARD)) as service, place_of(service) as found:
        yield found


def key(which: str) -> str:
    return f"Authorization: Bearer {which}"


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [
    "X: y", "Authorization:", "Authorization: Bearer", "Authorization: Bearer ", "Authorization: Bearer nobody",
    "Authorization: Bearer first-ke", "Authorization: Bearer first-key2", "Authorization: Basic first-key",
    "Authorization: first-key", "Authorization: Bearer first-key second-key", "Authorization: Bearer FIRST-KEY",
    "Authorization: Bearer \xe9"])
def test_without_a_key_there_is_nothing(place, given):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/models", None), ("/metrics", None), ("/tokenize", {}),
                       ("/openapi.json", None), ("/nothing", None), ("/health/", None), ("//", None)):
        with Wire(place.address) as wire:
            wire.socket.sendall(request(path, body, "X-A: b").replace(b"X-A: b", given.encode("latin-1")))
            answer = wire.answer()
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert place.ask(path, None).status == 200


def test_any_key_opens(place):
    first, second = (text_of(place, key(one)) for one in KEYS)
    assert first == second
    assert place.ask("/metrics", None, "authorization: bearer   first-key").status == 200


def test_users_of_two_keys_are_not_the_same(place, monkeypatch):
    """Nor is a user whose name looks like that of the other's."""
    seen: list[str | None] = []
    add = place.service.engine.add_nowait
    monkeypatch.setattr(place.service.engine, "add_nowait",
                        lambda *given, **options: seen.append(options["user"]) or add(*given, **options))
    for which in KEYS:
        for user in ({}, {"user": "ann"}, {"user": "key2/ann"}):
            assert place.ask("/v1/completions", COMPLETION | user, key(which)).status == 200
    assert len(set(seen)) == 6 and None not in seen


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:8000", 200), ("evil.example", 400),
    ("localhost.evil.example", 400), ("evil.example:80@localhost", 400),
    ("localhost/x", 400), ("", 400), ("[::1", 400), ("127.0.0.1", 400)])
def test_a_name_that_is_not_the_servers_is_refused(place, host, status):
    """So a page whose own name is pointed at this machine reads nothing of it."""
    with Wire(place.address) as wire:
        wire.send(f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n")
        assert wire.answer().status == status


def test_pages_of_other_origins_may_not_post(place):
    """A browser sends a text without asking first, and only keeps the answer from the page."""
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://localhost:1", 403),
                           ("http://[", 403), ("http://[::1", 403),
                           ("http://localhost", 200), ("https://friend.example", 200)):
        answer = place.ask("/v1/completions", COMPLETION, key(KEYS[0]), f"Origin: {origin}")
        assert answer.status == status, origin
        allowed = answer.headers.get("access-control-allow-origin")
        assert allowed == ("https://friend.example" if origin == "https://friend.example" else None)


def test_a_friendly_page_may_ask_first_without_a_key(place):
    for origin, status in (("https://friend.example", 200), ("https://evil.example", 400)):
        answer = place.ask("/v1/completions", None, f"Origin: {origin}", "Access-Control-Request-Method: POST",
                           "Access-Control-Request-Headers: authorization,content-type", method="OPTIONS")
        assert answer.status == status
        assert ("access-control-allow-origin" in answer.headers) is (status == 200)
    answer = place.ask("/v1/models", None, "Origin: https://friend.example")
    assert answer.status == 401  # and it may read why
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"


def test_without_origins_there_is_no_cors_at_all():
    with service_of_pair(ServerSettings("lm")) as service, place_of(service) as place:
        for method in ("GET", "OPTIONS"):
            answer = place.ask("/v1/models", None, "Origin: https://a.example", method=method)
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_answers_are_not_what_they_do_not_say(place):
    for path, body in (("/health", None), ("/v1/models", None), ("/v1/completions", COMPLETION)):
        answer = place.ask(path, body, key(KEYS[0]), "X-Request-Id: mine")
        assert answer.status == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer" and answer.headers["x-request-id"] == "mine"
        assert "server" not in answer.headers
    assert len(place.ask("/health", None, "X-Request-Id: " + "x" * 500).headers["x-request-id"]) == 32


# -- what is told -----------------------------------------------------------------------------------------------------


def test_whatever_clients_ask_for_metrics_have_few_lines(place):
    def lines() -> int:
        return place.ask("/metrics", None, key(KEYS[0])).body.count(b"\n")

    def ask(number: int) -> None:
        place.ask(f"/health/{number}", None)
        place.ask(f"/v1/models/{number}", None, key(KEYS[0]))
        place.ask("/health", None, method=f"BREW{number}")

    ask(0)
    lines()  # which has some of its own
    before = lines()
    for number in range(1, 20):
        ask(number)
    assert lines() == before
    assert place.metric('stars:http_requests_total{method="other",path="/health",status="405"}') >= 20


def test_a_path_makes_no_lines_of_its_own_in_a_log(place, monkeypatch, caplog):
    def broken(*_: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr("stars.serve.http.limits._name", broken)
    assert place.ask("/a%0Aa%20line", None).status == 500
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "GET '/a\\na line' failed"


def test_a_request_is_counted_and_nothing_of_it_is_logged(place, caplog):
    line = 'stars:http_requests_total{method="POST",path="/v1/completions",status="200"}'
    before = place.metric(line)
    secret = "a prompt that nobody else may see"
    with caplog.at_level(logging.DEBUG), set_to(place, log_requests=True):
        logging.getLogger("stars.serve.requests").propagate = True
        place.ask("/v1/completions", COMPLETION | {"prompt": secret}, key(KEYS[0]), "X-Request-Id: mine")
        place.ask("/v1/completions", COMPLETION | {"prompt": secret, "model": secret}, key(KEYS[0]))
        place.ask(f"/nothing/{secret.replace(' ', '-')}", None, key(KEYS[0]))
        wait_until(lambda: sum("/metrics" not in line for line in caplog.messages) > 2)
    lines = [line.split() for line in caplog.messages if "/metrics" not in line]
    assert place.metric(line) == before + 1
    assert lines[0][:4] == ["mine", "POST", "/v1/completions", "200"] and lines[0][4].endswith("s")
    assert lines[0][5].startswith("id=cmpl-") and lines[0][7] == "completion_tokens=12"
    assert [line[1:4] for line in lines[1:]] == [["POST", "/v1/completions", "404"], ["GET", "other", "404"]]
    assert "nobody" not in caplog.text and KEYS[0] not in caplog.text
    assert place.metric('stars:http_request_duration_seconds_count{path="/v1/completions"}') > 1
    assert place.metric("stars:http_connections") == 1  # which asks


@pytest.mark.rounds_raise
def test_nothing_of_a_prompt_is_logged_where_its_reward_fails(place, monkeypatch, caplog):
    """Beside others, so that the round is told of, and each of them is run by itself."""
    secret = "a prompt that nobody else may see"
    body = COMPLETION | {"prompt": [secret, secret + "!"], "n": 2}
    monkeypatch.setattr(REWARD, "fails", True)
    with caplog.at_level(logging.DEBUG):
        assert place.ask("/v1/completions", body, key(KEYS[0])).status == 500
        assert place.ask("/v1/completions", body | {"stream": True}, key(KEYS[0])).status == 500
    assert [record for record in caplog.records if record.exc_info], "what broke is told"
    assert "nobody" not in caplog.text and KEYS[0] not in caplog.text


def test_nothing_is_logged_that_was_not_asked_for(place, caplog):
    with caplog.at_level(logging.INFO):
        assert place.ask("/v1/completions", COMPLETION, key(KEYS[0])).status == 200
        assert place.ask("/v1/completions", b"{", key(KEYS[0])).status == 400
    assert not caplog.messages


def test_when_to_come_again_follows_the_pace(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("stars.serve.http.traffic.time.monotonic", lambda: now[0])
    traffic = Traffic()

    def seconds(under_way: int) -> int:
        traffic.under_way = under_way
        return traffic.retry_after()

    assert seconds(5) == 1  # nothing is known yet
    now[0] += 7.5
    assert seconds(5) == 8  # nothing has ended for so long
    for _ in range(20):
        now[0] += 0.5
        traffic.ended()
    assert seconds(8) == math.ceil(8 / (20 / 17.5))
    assert (seconds(10**6), seconds(0)) == (60, 1)
    now[0] += 59
    assert seconds(1) == 60 // 3  # three of them have ended in the last minute
    now[0] += 3600
    assert seconds(1) == 60
    for _ in range(1000):
        now[0] += 0.01
        traffic.ended()
    assert seconds(100) == 1  # what came to an end of late counts, not the idle time before


# -- what breaks ------------------------------------------------------------------------------------------------------


@pytest.mark.rounds_raise
def test_a_reward_that_raises_ends_its_request_alone(place, monkeypatch):
    right = text_of(place, key(KEYS[0]))
    monkeypatch.setattr(REWARD, "fails", True)
    whole = place.ask("/v1/completions", COMPLETION, key(KEYS[0]))
    assert whole.status == 500 and whole.error["type"] == "server_error"
    streamed = place.ask("/v1/completions", COMPLETION | {"stream": True}, key(KEYS[0]))
    assert streamed.status == 500
    plain = COMPLETION | {"model": "lm:plain", "stars": {}}
    assert place.ask("/v1/completions", plain, key(KEYS[0])).status == 200
    monkeypatch.setattr(REWARD, "fails", False)
    assert text_of(place, key(KEYS[0])) == right
    assert place.ask("/health").status == 200 and is_free(place)


@pytest.mark.rounds_raise
def test_a_reward_that_raises_in_a_stream_is_told_there(place, monkeypatch):
    with Wire(place.address) as wire:
        wire.send(request("/v1/completions", LONG, key(KEYS[0])))
        assert wire.socket.recv(1) == b"H"
        monkeypatch.setattr(REWARD, "fails", True)
        wire._file.readline()
        wire.head()
        *_, last, done = events(wire.chunks())
        assert last["error"]["type"] == "server_error" and done == "[DONE]"
        monkeypatch.setattr(REWARD, "fails", False)
        assert wire.send(request("/health")).answer().status == 200  # the connection goes on
    wait_until(lambda: is_free(place))


@pytest.mark.rounds_raise
def test_a_reward_server_that_is_down_ends_its_requests_alone(caplog):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    reward = stars.RemoteReward(f"http://127.0.0.1:{port}", model="rm", retries=0, timeout=5)
    with service_of_pair(ServerSettings("lm", drain_seconds=0.0), reward=reward) as service, place_of(service) as place:
        for stream in (False, True):
            answer = place.ask("/v1/completions", COMPLETION | {"stream": stream})
            assert (answer.status, answer.error["type"]) == (500, "server_error"), answer.body
        assert place.ask("/v1/completions", COMPLETION | {"model": "lm:plain", "stars": {}}).status == 200
        assert place.ask("/health").status == 200
        wait_until(lambda: is_free(place))


def test_a_handler_that_raises_is_answered_for(place, monkeypatch, caplog):
    def broken(*_: Any) -> Any:
        raise ValueError("a secret of the server's")

    monkeypatch.setattr("stars.serve.http.completions.asked_completion", broken)
    answer = place.ask("/v1/completions", COMPLETION, key(KEYS[0]))
    assert (answer.status, answer.error["type"]) == (500, "server_error") and b"secret" not in answer.body
    assert [record.name for record in caplog.records if record.exc_info] == ["stars.serve.http.limits"]  # once
    monkeypatch.undo()
    assert text_of(place, key(KEYS[0]))
    wait_until(lambda: is_free(place))


def test_what_an_application_refuses_is_no_error_of_its_log(place, caplog):
    """Of Ray Serve's, which has no handlers of its own, thousands may be: 429, or 503 while no engine is there."""
    async def full(scope: Any, receive: Any, send: Any) -> None:
        raise ApiError(429, "too many", code="queue_full")

    app = Counted(full, Service(place.service.engine, ServerSettings("toy")))
    answer = TestClient(app).get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1 and not [record for record in caplog.records if record.exc_info]


def test_an_answer_that_breaks_off_is_cut_off(place, monkeypatch):
    """Who reads must not take what came for all there is."""
    async def broken(self: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data", "more_body": True})
        raise ValueError("broken")

    monkeypatch.setattr("stars.serve.http.streaming.EventStream._send", broken)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", True)
    with Wire(place.address) as wire, pytest.raises((EOFError, ConnectionError)):
        wire.send(request("/v1/completions", LONG, key(KEYS[0]))).answer()
    monkeypatch.undo()
    wait_until(lambda: is_free(place))


@pytest.mark.filterwarnings("ignore")
def test_a_loop_that_died_is_no_health():
    """And everybody is told so, in the midst of a stream too; the process stays."""
    with service_of_pair(ServerSettings("lm", drain_seconds=0.0)) as service, place_of(service) as place:
        engine = service.engine.engine
        with Wire(place.address) as wire:
            wire.send(request("/v1/completions", LONG))
            assert wire.socket.recv(1) == b"H"

            def broken(*_: Any) -> Any:
                raise stars.errors.IntegrityError("the books do not balance")

            engine._advance = broken
            wire._file.readline()
            wire.head()
            *_, last, done = events(wire.chunks())
            assert last["error"]["code"] == "engine_dead" and done == "[DONE]"
        for path, body, status in (("/health", None, 503), ("/ready", None, 503), ("/v1/completions", COMPLETION, 503),
                                   ("/metrics", None, 200)):
            assert place.ask(path, body).status == status, path


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_server_that_shuts_down_says_so_and_goes_on_with_what_it_has():
    """Until --drain-seconds are over: then streams end with what was committed."""
    with service_of_pair(ServerSettings("lm", drain_seconds=0.5)) as service, place_of(service) as place, Wire(
            place.address) as wire, Wire(place.address) as kept:
        assert kept.send(request("/health")).answer().status == 200
        wire.send(request("/v1/completions", SLOW | {"stream_options": {"include_usage": True}}))
        answer_head = wire._file.readline(), wire.head()
        assert answer_head[0].split()[1] == b"200"
        place.server.drain()
        begin = time.monotonic()
        assert place.ask("/health").status == 200
        assert place.ask("/ready").status == 503
        refused = kept.send(request("/v1/completions", COMPLETION)).answer()
        assert (refused.status, refused.error["code"], refused.headers["connection"]) == (503, "draining", "close")
        assert 1 <= int(refused.headers["retry-after"]) <= 60 and kept.ended()
        found = list(events(wire.chunks()))
        seconds = time.monotonic() - begin
        reasons = [choice["finish_reason"] for one in found[:-1] for choice in one["choices"] if
                   choice["finish_reason"]]
        assert reasons == ["abort"] * 8 and found[-1] == "[DONE]" and 0.4 < seconds < 15
        written = sum(len(choice["text"]) for one in found[:-1] for choice in one["choices"])
        assert written and found[-2]["usage"]["completion_tokens"] > 0
        wait_until(lambda: not place.service.engine.is_running)


def test_who_does_not_stream_gets_what_was_committed_before_the_end():
    with service_of_pair(ServerSettings("lm", drain_seconds=0.5)) as service, place_of(service) as place, Wire(
            place.address) as wire:
        wire.send(request("/v1/completions", SLOW | {"stream": False}))
        wait_until(lambda: service.engine.metrics.snapshot()["stars:generation_tokens_total"] >= 24)  # of all eight
        place.server.drain()
        answer = wire.answer()
        found = json.loads(answer.body)
        assert answer.status == 200 and [one["finish_reason"] for one in found["choices"]] == ["abort"] * 8
        assert found["usage"]["completion_tokens"] > 0 and all([one["text"] for one in found["choices"]])


def test_who_reads_slowly_is_read_to_before_the_end(monkeypatch):
    """What was answered is under way until it was read, or until the time is over."""
    large = Family("large", "gauge", "x" * (6 << 20), {"": 1})
    with service_of_pair(ServerSettings("lm", drain_seconds=30.0)) as service, place_of(service) as place, Wire(
            place.address) as wire:
        monkeypatch.setattr(service.traffic, "families", lambda: [large])
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        wire.send(request("/metrics"))
        assert wire.socket.recv(1) == b"H"
        place.server.drain()
        time.sleep(1.5)  # for longer than connections that ask nothing are waited for
        begin = time.monotonic()
        while (part := wire.socket.recv(1 << 16)).find(b"# TYPE large") < 0:
            assert part, "cut off"
            time.sleep(0.01 if time.monotonic() < begin + 1.5 else 0)
        wait_until(lambda: not service.engine.is_running)


def test_a_round_that_does_not_end_is_not_waited_for(monkeypatch, caplog):
    """Its requests are told so."""
    hangs = threading.Event()

    def reward(prompt: Any, responses: Any) -> list[float]:
        assert hangs.wait(30)
        return [0.0 for _ in responses]

    monkeypatch.setattr("stars.serve.http.server.TOLD_SECONDS", 0.2)
    settings = ServerSettings("lm", drain_seconds=0.0)
    with service_of_pair(settings, reward=stars.FunctionReward(reward)) as service, place_of(service) as place, Wire(
            place.address) as wire:
        try:
            wire.send(request("/v1/completions", COMPLETION))
            wait_until(lambda: service.traffic.under_way)
            place.server.drain()
            answer = wire.answer()
        finally:
            hangs.set()
        assert (answer.status, answer.error["code"]) == (503, "draining")
        assert not [record for record in caplog.records if record.exc_info]


def test_a_server_without_requests_ends_at_once():
    with service_of_pair(ServerSettings("lm", drain_seconds=100.0)) as service, place_of(service) as place:
        text_of(place)
        begin = time.monotonic()
        place.server.drain()
        wait_until(lambda: not service.engine.is_running)
        assert time.monotonic() - begin < 30
