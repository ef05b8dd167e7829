"""What comes over connections that should not: each gets a clear status, and nobody else notices.

"Nobody else" is a request beside, over a connection of its own, whose answer must be the text that its seed gives.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import h11
import pytest

from serving_http import service_of_pair, wait_until
from stars.exposition import Family
from stars.serve.http.server import room_for
from stars.serve.http.settings import ServerSettings
from wire import Place, Wire, events, place_of, request

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SETTINGS = ServerSettings("lm", header_seconds=0.6, body_seconds=0.6, write_seconds=0.6, drain_seconds=0.0,
                          max_connections=60, max_concurrent_requests=6)
COMPLETION = {"model": "lm", "prompt": "This film was", "max_tokens": 12, "seed": 5,
              "stars": {"policy": "stars", "reward_threshold": 0.5, "segment_size": 4, "max_attempts": 3}}
LONG = COMPLETION | {"max_tokens": 200, "ignore_eos": True, "stream": True}
GREAT = 100 << 20


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with service_of_pair(SETTINGS) as service, place_of(service) as found:
        yield found


@pytest.fixture(scope="module")
def right(place) -> str:
    """The text of COMPLETION, from a server that nothing else troubles."""
    return text_of(place)


def text_of(place: Place, *headers: str) -> str:
    answer = place.ask("/v1/completions", COMPLETION, *headers)
    assert answer.status == 200, answer.body
    return json.loads(answer.body)["choices"][0]["text"]


@contextmanager
def set_to(place: Place, **changes: Any) -> Iterator[None]:
    """Other settings for a while."""
    before, place.service.settings = place.service.settings, dataclasses.replace(place.service.settings, **changes)
    try:
        yield
    finally:
        place.service.settings = before


def is_free(place: Place) -> bool:
    """Whether the engine holds nothing of a request, and the server none."""
    engine = place.service.engine.engine
    return not engine._requests and not place.service.traffic.under_way


# -- what cannot be read ----------------------------------------------------------------------------------------------

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WRONG = {
    "no HTTP": (b"hello\r\n\r\n", 400, "bad_http"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 400, "bad_http"),
    "another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "bad_http"),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400, "bad_http"),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "bad_http"),
    "a header without a name": (b"GET /health HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n", 400, "bad_http"),
    "a length that is none": (HEAD + b"Content-Length: -5\r\n\r\n", 400, "bad_http"),
    "two lengths": (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400, "bad_http"),
    "a length and an encoding": (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0"
                                 b"\r\n\r\n", 400, "bad_http"),
    "an address with a slash behind it": (request("/v1/completions/", COMPLETION), 404, None),
    "an encoding that is unknown": (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501, "bad_http"),
    "a broken chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", 400, "bad_http"),
    "one long header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", 431, "bad_http"),
    "many headers": (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 40_000 + b"\r\n", 431, "bad_http"),
    "headers without end": (b"GET /health HTTP/1.1\r\n" + b"X: yyyyyyyyyy\r\n" * 20_000, 431, "bad_http"),
    "a body in crumbs": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 40_000, 400, "bad_http"),
    "300 headers": (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 300 + b"\r\n", 431, "bad_http"),
    "a long target": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431, "bad_http"),
    "broken JSON": (request("/v1/completions", b'{"model": "lm", "prompt'), 400, None),
    "no object": (request("/v1/completions", b"[]"), 400, None),
    "an empty body": (request("/v1/completions", b""), 400, None),
    "a number that JSON lacks": (request("/v1/completions", b'{"prompt": "a", "temperature": NaN}'), 400, None),
    "a wrong type": (request("/v1/completions", COMPLETION | {"max_tokens": "many"}), 400, None),
    "another wrong type": (request("/v1/chat/completions", {"model": "lm", "messages": 5}), 400, None),
    "no such model": (request("/v1/completions", COMPLETION | {"model": "nobody"}), 404, "model_not_found"),
    "no such address": (request("/v2/completions", COMPLETION), 404, None),
    "no such method": (request("/v1/completions", None, method="BREW"), 405, None),
    "a GET of what is posted to": (request("/v1/completions", None), 405, None),
    "a POST to what is got": (request("/health", {}), 405, None),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_has_a_status_of_its_own(place, what):
    sent, status, code = WRONG[what]
    with Wire(place.address) as wire:
        try:
            wire.send(sent)
        except ConnectionError:
            pass  # the server heard enough
        answer = wire.answer()
        assert answer.status == status and answer.headers["content-type"] == "application/json"
        assert answer.error["message"] and answer.error["code"] == code
        assert answer.error["type"].endswith("_error") and answer.error["type"] != "server_error", "who is at fault"
        assert code != "bad_http" or wire.ended()
    assert place.service.engine.is_running


def test_who_sends_rubbish_disturbs_nobody(place, right):
    """All of it at once, again and again, beside requests whose text is known."""
    over = threading.Event()

    def trouble() -> None:
        while not over.is_set():
            for sent, status, _ in WRONG.values():
                with Wire(place.address) as wire:
                    try:
                        assert wire.send(sent).answer().status == status
                    except OSError:
                        pass

    thread = threading.Thread(target=trouble)
    thread.start()
    try:
        assert [text_of(place) for _ in range(6)] == [right] * 6
    finally:
        over.set()
        thread.join()
    wait_until(lambda: is_free(place))


# -- HTTP that is unusual and right -----------------------------------------------------------------------------------


def test_http_1_0_is_answered_and_closed(place, right):
    with Wire(place.address) as wire:
        answer = wire.send(b"GET /health HTTP/1.0\r\n\r\n").answer()
        assert (answer.status, answer.body) == (200, b'{"status":"ok"}') and wire.ended()
    with Wire(place.address) as wire:
        answer = wire.send(request("/v1/completions", COMPLETION, version="1.0")).answer()
        assert json.loads(answer.body)["choices"][0]["text"] == right and wire.ended()


def test_a_stream_over_http_1_0_ends_with_the_connection(place, right):
    with Wire(place.address) as wire:
        answer = wire.send(request("/v1/completions", COMPLETION | {"stream": True}, version="1.0")).answer()
    found = list(events(iter([answer.body])))
    assert found[-1] == "[DONE]"
    assert "".join(choice["text"] for one in found[:-1] for choice in one["choices"]) == right


def test_requests_behind_each_other_are_answered_in_order(place, right):
    with Wire(place.address) as wire:
        wire.send(request("/v1/completions", COMPLETION) + request("/health") + request("/nothing")
                  + request("/v1/completions", COMPLETION))
        assert json.loads(wire.answer().body)["choices"][0]["text"] == right
        assert [wire.answer().status, wire.answer().status] == [200, 404]
        assert json.loads(wire.answer().body)["choices"][0]["text"] == right


def test_a_head_request_has_a_head_alone(place):
    with Wire(place.address) as wire:
        for path, status in (("/health", 200), ("/ready", 200), ("/v1/completions", 405), ("/nothing", 404)):
            answer = wire.send(request(path, method="HEAD")).answer(bodiless=True)
            assert answer.status == status
        assert wire.send(request("/health")).answer().body == b'{"status":"ok"}'  # nothing stands before it


def test_a_get_may_have_a_body_that_nobody_reads(place):
    with Wire(place.address) as wire:
        wire.send(request("/health", b"x" * 1000, method="GET") + request("/health"))
        assert [wire.answer().status, wire.answer().status] == [200, 200]


def test_who_asks_whether_to_go_on_is_told(place, right):
    body = json.dumps(COMPLETION).encode()
    with Wire(place.address) as wire:
        wire.send(HEAD, f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n")
        assert wire.answer().status == 100
        answer = wire.send(body).answer()
        assert json.loads(answer.body)["choices"][0]["text"] == right
    with Wire(place.address) as wire:
        wire.send(HEAD, f"Expect: 100-continue\r\nContent-Length: {GREAT}\r\n\r\n")
        assert wire.answer().status == 413 and wire.ended()  # not told to go on


# -- what is too much -------------------------------------------------------------------------------------------------


def poured(wire: Wire, parts: Iterator[bytes]) -> int:
    """How many bytes the server lets in before it closes."""
    sent = 0
    try:
        for part in parts:
            wire.socket.sendall(part)
            sent += len(part)
    except OSError:
        pass
    return sent


@pytest.mark.parametrize("chunked", [False, True], ids=["said", "chunked"])
def test_a_body_of_100_mb_is_refused_unread(place, right, chunked):
    """The whole answer comes to a client that sends on and on, and to one that looks while it sends."""
    part = b"x" * (1 << 16)
    framed = b"%x\r\n" % len(part) + part + b"\r\n" if chunked else part
    how = "Transfer-Encoding: chunked\r\n\r\n" if chunked else f"Content-Length: {GREAT}\r\n\r\n"
    for path, method in (("/v1/completions", "POST"), ("/nothing", "POST"), ("/health", "GET"), ("/", "PUT")):
        with Wire(place.address) as wire:
            begin = time.monotonic()
            wire.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{how}")
            sent = poured(wire, (framed for _ in range(GREAT // len(part))))
            answer = wire.answer()
            assert (answer.status, answer.error["code"]) == (413, "body_too_large")
            assert answer.headers["connection"] == "close"
            assert sent < 40 << 20 and wire.ended() and time.monotonic() - begin < 20
    assert text_of(place) == right
    assert place.service.traffic.buffered == 0


@pytest.mark.parametrize("before", [b"", request("/health")], ids=["alone", "behind another"])
def test_what_costs_much_to_read_holds_up_nobody(place, right, before):
    """h11 is busy for long with chunks of a byte each, and nobody else has a turn all that while."""
    sent, begin = WRONG["a body in crumbs"][0], time.monotonic()
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(sent)
    while reader.next_event() is not h11.NEED_DATA:
        pass
    long = time.monotonic() - begin
    with Wire(place.address) as wire:
        begin = time.monotonic()
        poured(wire, iter([before + sent]))
        assert not before or wire.answer().status == 200
        assert wire.answer().status == 400
        assert text_of(place) == right and time.monotonic() - begin < long / 2


def test_a_key_that_is_there_twice_is_found_at_once(place, right):
    """Of very many, the last."""
    names = [f"{number:05}" for number in range(20_000)]
    body = b"{%b}" % b",".join(b'"%b":1' % name.encode() for name in [*names, names[-1]])
    begin = time.monotonic()
    answer = place.ask("/v1/completions", body)
    assert answer.status == 400 and "'19999' twice" in answer.error["message"] and time.monotonic() - begin < 10


def test_a_body_in_fair_pieces_is_read(place, right):
    body = json.dumps(COMPLETION, indent=1).replace("\n", "\r\n").encode()
    parts = [body[at:at + 7] for at in range(0, len(body), 7)]
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    with Wire(place.address) as wire:
        answer = wire.send(HEAD, "Transfer-Encoding: chunked\r\n\r\n", pieces, "0\r\n\r\n").answer()
        assert json.loads(answer.body)["choices"][0]["text"] == right
    lines = json.dumps(COMPLETION | {"user": "ann"}, indent=0).replace("\n", "\r\n" * 5000).encode()
    assert json.loads(place.ask("/v1/completions", lines).body)["choices"][0]["text"] == right


def test_a_body_may_be_as_long_as_is_said(place):
    most = SETTINGS.max_body_bytes
    for length, status in ((most, 400), (most + 1, 413)):
        body = json.dumps(COMPLETION).encode().ljust(length - 1) + b"x"  # no JSON
        assert place.ask("/v1/completions", body).status == status
        with Wire(place.address) as wire:
            wire.send(HEAD, f"Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n", body, "\r\n0\r\n\r\n")
            assert wire.answer().status == status


def test_bodies_together_have_a_bound(place, monkeypatch):
    monkeypatch.setattr("stars.serve.http.limits.BODIES", 2)
    with set_to(place, max_body_bytes=1000, body_seconds=20), ExitStack() as stack:
        wires = [stack.enter_context(Wire(place.address)) for _ in range(3)]
        for wire in wires:
            wire.send(HEAD, "Content-Length: 1000\r\n\r\n", b" " * 800)
        wires[0].socket.settimeout(0.3)
        refused = [wire for wire in wires if _answers(wire, 503)]
        assert len(refused) == 1
    wait_until(lambda: place.service.traffic.buffered == 0)


def _answers(wire: Wire, status: int) -> bool:
    wire.socket.settimeout(0.3)
    try:
        answer = wire.answer()
        assert answer.headers["retry-after"]
        return answer.status == status
    except TimeoutError:
        return False


# -- who is slow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", b"G", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_head_that_does_not_come_is_not_waited_for(place, begun):
    """Dripping does not help."""
    with Wire(place.address, seconds=5) as wire:
        begin = time.monotonic()
        wire.send(begun)
        stop = threading.Event()

        def drip() -> None:
            while begun and not stop.wait(0.1):
                poured(wire, iter([b"a"]))

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            answer = wire.answer()
            seconds = time.monotonic() - begin
        finally:
            stop.set()
            thread.join()
        assert (answer.status, answer.error["code"]) == (408, "head_timeout") and 0.5 < seconds < 15
        assert wire.ended()


def test_a_head_that_does_not_come_behind_an_answer_is_not_waited_for(place):
    with Wire(place.address) as wire:
        assert wire.send(request("/health")).answer().status == 200
        wire.send(b"GET /hea")
        assert wire.answer().status == 408 and wire.ended()


def test_a_body_that_does_not_come_is_not_waited_for(place, right):
    for framing, drops in (("Content-Length: 1000\r\n\r\n", b"x"),
                           ("Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")):
        with Wire(place.address) as wire:
            wire.send(HEAD, framing)
            begin = time.monotonic()
            for _ in range(4):
                wire.send(drops)
                time.sleep(0.1)
            answer = wire.answer()
            assert (answer.status, answer.error["code"]) == (408, "body_timeout") and time.monotonic() - begin < 15
            assert wire.ended()
    assert text_of(place) == right


def test_who_does_not_read_is_let_go(place, right):
    """Its answers stay in no memory: a hundred texts of metrics are more than the system's buffers take."""
    before = place.service.traffic._refused["reader"]
    with Wire(place.address) as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        poured(wire, (request("/metrics") for _ in range(800)))
        assert text_of(place) == right
        wait_until(lambda: place.service.traffic._refused["reader"] > before, 10)


def test_who_reads_slowly_is_read_to(place, monkeypatch):
    """For longer than a client may do nothing: what counts is that it goes on."""
    before = place.service.traffic._refused["reader"]
    large = Family("large", "gauge", "x" * (6 << 20), {"": 1})
    monkeypatch.setattr(place.service.traffic, "families", lambda: [large])
    with set_to(place, write_seconds=0.5), Wire(place.address) as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        wire.send(request("/metrics"))
        begin, read = time.monotonic(), 0
        while read < 6 << 20:
            part = wire.socket.recv(1 << 16)
            assert part, "cut off"
            read += len(part)
            time.sleep(0.015)
        assert time.monotonic() - begin > 1.0 and place.service.traffic._refused["reader"] == before


# -- who goes away ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [b"", request("/health")], ids=["alone", "with another behind"])
@pytest.mark.parametrize("body", [LONG, LONG | {"stream": False}], ids=["stream", "whole"])
def test_what_a_client_leaves_ends(place, right, body, behind):
    """A stream that is closed after a byte, and a request whose client does not wait, free their pages and their
    places, and count as 499."""
    line = 'stars:http_requests_total{method="POST",path="/v1/completions",status="499"}'
    before = place.metric(line)
    with Wire(place.address) as wire:
        wire.send(request("/v1/completions", body) + behind)
        if body["stream"]:
            assert wire.socket.recv(1) == b"H"
        else:
            wait_until(lambda: place.service.engine.engine._requests)
    wait_until(lambda: is_free(place), 5)
    assert place.metric(line) == before + 1
    assert text_of(place) == right


def test_a_body_that_breaks_off_is_nobodys_request(place):
    with Wire(place.address) as wire:
        wire.send(HEAD, "Content-Length: 1000\r\n\r\n", b"{")
    wait_until(lambda: is_free(place))
    assert place.metric('stars:http_requests_total{method="POST",path="other",status="499"}') > 0


# -- too many ---------------------------------------------------------------------------------------------------------


def test_connections_that_ask_nothing_give_way(place, right):
    """Five times as many as may be: who asks is heard, those that were opened last stay, the others are told why."""
    with set_to(place, header_seconds=30), ExitStack() as stack:
        wires = [stack.enter_context(Wire(place.address)) for _ in range(5 * SETTINGS.max_connections)]
        assert text_of(place) == right
        assert place.service.traffic.open_connections <= SETTINGS.max_connections
        for wire in wires[:100]:
            answer = wire.answer()
            assert (answer.status, answer.error["code"]) == (503, "too_many_connections") and wire.ended()
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert wires[-1].send(request("/health")).answer().status == 200
    wait_until(lambda: place.service.traffic.open_connections <= 1)


def test_connections_that_are_in_use_stay(place):
    """Where all are, the next one is told so."""
    with set_to(place, max_connections=3), ExitStack() as stack:
        wires = [stack.enter_context(Wire(place.address)) for _ in range(3)]
        wait_until(lambda: place.service.traffic.open_connections <= 3)
        for wire in wires:
            wire.send(request("/v1/completions", LONG | {"ignore_eos": True}))
        wait_until(lambda: place.service.traffic.under_way == 3)
        with Wire(place.address) as late:
            answer = late.send(request("/health")).answer()
            assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
        for wire in wires:
            assert wire.answer().status == 200


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_flood_of_connections_is_hardly_noticed(place, right, count):
    """Requests beside go on in about the time that they take alone."""
    room_for(count)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < count + SETTINGS.max_connections + 1000:
        pytest.skip("this process may not open so many files")
    alone = sorted(_seconds(place, right) for _ in range(8))[4]
    beside: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            beside.append(_seconds(place, right))

    thread = threading.Thread(target=ask)
    thread.start()
    found = []
    try:
        for _ in range(count):
            made = socket.socket()
            made.setblocking(False)
            made.connect_ex(place.address)
            found.append(made)
        time.sleep(0.5)
    finally:
        over.set()
        thread.join()
        for made in found:
            made.close()
    beside.sort()
    print(f"{count} connections: alone {alone:.3f} s, beside median {beside[len(beside) // 2]:.3f}, most "
          f"{beside[-1]:.3f} of {len(beside)}")
    assert beside[-1] < alone + 2.0
    wait_until(lambda: place.service.traffic.open_connections <= 1)


def _seconds(place: Place, right: str) -> float:
    begin = time.monotonic()
    assert text_of(place) == right
    return time.monotonic() - begin


def test_requests_beyond_the_limit_come_again_later(place, right):
    with set_to(place, max_concurrent_requests=1), Wire(place.address) as wire:
        wire.send(request("/v1/completions", LONG))
        wait_until(lambda: place.service.traffic.under_way == 1)
        answer = place.ask("/v1/completions", COMPLETION)
        assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert place.ask("/health").status == 200  # what asks for no work is answered
    wait_until(lambda: is_free(place))
    assert text_of(place) == right
