"""Traces: written, read back, refused where damaged, shown in the terminal and as a page."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import stars
from stars.cli.terminal import Style, visible
from stars.trace import (
    TraceAttempt,
    TraceCompletion,
    TraceRequest,
    TraceSegment,
    request_trace,
    trace_records,
)
from stars.trace.json_lines import loads, too_deep
from stars.trace.page import page
from stars.trace.show import request_lines

PROMPTS = ["The quick brown fox", "Once upon a time"]
PARAMS = stars.SamplingParams(max_tokens=21, seed=3)


@pytest.fixture(scope="module")
def engine(tiny_model):
    return stars.Engine(tiny_model(tokenizer=True), tiny_model(tokenizer=True, head="reward"), max_num_lanes=8,
                        max_num_seqs=4)


@pytest.fixture(scope="module")
def outputs(engine):
    threshold = engine.calibrate(PROMPTS, PARAMS, quantile=0.7, num_samples=4)
    policy = stars.STARS(segment_size=4, max_attempts=4, reward_threshold=threshold, width=3)
    return engine.generate(PROMPTS, replace(PARAMS, n=2), policy, use_tqdm=False)


@pytest.fixture
def lines(engine, outputs) -> list[str]:
    file = io.StringIO()
    stars.write_trace(file, outputs, engine.tokenizer, PARAMS)
    return file.getvalue().splitlines(keepends=True)


def attempt(**fields) -> TraceAttempt:
    given = dict(segment=0, attempt=1, text=" fine", token_ids=[5], logprob=-1.0, reward=0.5, threshold=0.25,
                 accept_probability=1.0, margin=0.25, accepted=True, committed=True)
    return TraceAttempt(**{**given, **fields})


def request_of(*segments: list[TraceAttempt], prompt="A prompt", error=None) -> TraceRequest:
    completion = TraceCompletion(0, "text", [5], "length", None, error, 0.5, -1.0, {"attempts": 1, "segments": 1},
                                 [TraceSegment(list(segment)) for segment in segments])
    return TraceRequest("7", prompt, [1, 2], {"max_tokens": 4}, {"name": "STARS", "alpha": 0.5, "width": None}, 3, None,
                        {}, [completion])


def test_round_trip(engine, outputs, tmp_path):
    stars.write_trace(tmp_path / "trace.jsonl", outputs, engine.tokenizer, PARAMS)
    assert stars.read_trace(tmp_path / "trace.jsonl") == [request_trace(output, engine.tokenizer, PARAMS)
                                                          for output in outputs]


def test_every_line_is_strict_json(lines):
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)
    assert json.loads(lines[0])["format"] == "stars-trace"


def test_texts_of_committed_attempts_join_to_the_text(engine, outputs):
    # The tiny model's bytes are hardly ever valid UTF-8, so characters are split over segments all the time.
    for output in outputs:
        for completion in request_trace(output, engine.tokenizer).completions:
            assert "".join(segment.committed.text for segment in completion.segments) == completion.text


def test_text_of_a_split_character(outputs, engine):
    class Bytes:
        def decode(self, token_ids):
            return bytes(token_ids).decode("utf8", "replace")

    euro = list("€".encode())
    halves = [stars.Segment(part, 1.0, 0.0, True, [stars.Attempt(part, 1.0, 0.0, 1.0, True, -1.0)])
              for part in ([65, *euro[:2]], [euro[2], 66])]
    completion = stars.CompletionOutput(0, "A€B", [65, *euro, 66], finish_reason="length", segments=halves)
    output = replace(outputs[0], outputs=[completion], prompt_token_ids=[65])
    segments = request_trace(output, Bytes()).completions[0].segments
    assert [segment.committed.text for segment in segments] == ["A", "€B"]


def test_attempts_are_recorded_in_order_with_margins(outputs, engine):
    records = trace_records(outputs[0], engine.tokenizer)
    attempts = [record for record in records if record["type"] == "attempt"]
    assert len(attempts) == sum(len(s.attempts) for c in outputs[0].outputs for s in c.segments)
    for record in attempts:
        if record["reward"] is not None:
            assert record["margin"] == record["reward"] - record["threshold"]


def test_infinite_rewards_survive(engine, tiny_model, tmp_path):
    dead = stars.Engine(tiny_model(tokenizer=True), lambda prompt, responses: [-math.inf] * len(responses),
                        max_num_lanes=4)
    policy = stars.STARS(segment_size=4, max_attempts=2, alpha=1.0, reward_threshold=math.inf)
    written = dead.generate(PROMPTS[0], replace(PARAMS, max_tokens=8), policy, use_tqdm=False)
    stars.write_trace(tmp_path / "trace.jsonl", written, dead.tokenizer)
    assert "Infinity" not in (tmp_path / "trace.jsonl").read_text()
    (request,) = stars.read_trace(tmp_path / "trace.jsonl")
    assert request.policy["reward_threshold"] == math.inf
    assert all(a.reward == -math.inf for s in request.completions[0].segments for a in s.attempts)
    assert "-inf" in "\n".join(request_lines(request, Style(False), 80))
    assert "-inf" in page([request], "trace")


def test_without_a_tokenizer_texts_are_absent(outputs, tmp_path):
    stars.write_trace(tmp_path / "trace.jsonl", outputs[0], None)
    (request,) = stars.read_trace(tmp_path / "trace.jsonl")
    shown = request.completions[0].segments[0].committed
    assert shown.text is None
    assert " ".join(map(str, shown.token_ids)) in "\n".join(request_lines(request, Style(False), 100))


def replaced(line: str, **fields) -> str:
    return json.dumps({**json.loads(line), **fields}) + "\n"


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


DAMAGE = {
    "empty": (lambda lines: [], "line 1"),
    "foreign": (lambda lines: ['{"prompt": "hello"}\n'], "line 1.*not a trace"),
    "not json": (lambda lines: ["PK\x03\x04\n"], "line 1.*not JSON"),
    "not utf8": (lambda lines: [*lines[:2], b"\xff\xfe\n"], "line 3.*not JSON"),
    "newer": (lambda lines: [replaced(lines[0], version=99), *lines[1:]], "line 1.*version 99"),
    "cut in a line": (lambda lines: [*lines[:4], lines[4][:20]], "line 5.*cut short"),
    "cut between lines": (lambda lines: lines[:4], "line 4.*cut short"),
    "a line missing": (lambda lines: lines[:3] + lines[4:], "line 4.*out of order"),
    "no header": (lambda lines: lines[1:], "line 1.*not a trace"),
    "a list": (lambda lines: [lines[0], "[1]\n"], "line 2.*no JSON object"),
    "a bare NaN": (lambda lines: [*lines[:3], lines[3].replace('"logprob"', '"logprob": NaN, "old"')], "line 4.*NaN"),
    "wrong type": (lambda lines: [*lines[:3], replaced(lines[3], accepted="yes")], "line 4.*accepted"),
    "no number": (lambda lines: [*lines[:3], replaced(lines[3], reward="high")], "line 4.*reward"),
    "no token ids": (lambda lines: [*lines[:3], replaced(lines[3], token_ids=["a"])], "line 4.*token"),
    "huge number": (lambda lines: [*lines[:3], replaced(lines[3], reward=10**400)], "line 4.*reward"),
    "huge count": (lambda lines: [lines[0], replaced(lines[1], metrics={"n": 10**400}), *lines[2:]], "line 2.*metrics"),
    "another request's": (lambda lines: [*lines[:3], replaced(lines[3], request_id="other")], "line 4.*belong"),
    "nobody committed": (lambda lines: [replaced(line, committed=False) if '"attempt"' in line and i > 2 else line
                                        for i, line in enumerate(lines)], "committed"),
    "deeply nested": (lambda lines: [lines[0], "[" * 100_000 + "\n"], "line 2.*not JSON"),
    "nested 900 deep": (lambda lines: [lines[0], replaced(lines[1], params=nested(900)), *lines[2:]],
                        "line 2.*no JSON object"),
    "beyond numbers": (lambda lines: [*lines[:3], lines[3].replace('"logprob"', '"logprob": 1e400, "old"')],
                       "line 4.*1e400 is beyond"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_by_line(kind, lines, tmp_path):
    change, message = DAMAGE[kind]
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in change(list(lines))))
    with pytest.raises(stars.TraceError, match=message) as caught:
        stars.read_trace(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_status_of_attempts():
    rejected = attempt(accepted=False, committed=False, reward=-1.0)
    accepted = TraceSegment([rejected, attempt(attempt=2), attempt(attempt=3, accepted=False, committed=False)])
    assert [accepted.status(a) for a in accepted.attempts] == ["rejected", "accepted", "skipped"]
    assert accepted.counted == 2
    fallback = TraceSegment([rejected, attempt(attempt=2, accepted=False)])
    assert [fallback.status(a) for a in fallback.attempts] == ["rejected", "fallback"]
    no_threshold = TraceSegment([attempt(threshold=None, committed=False, accepted=False),
                                 attempt(attempt=2, threshold=None)])
    assert [no_threshold.status(a) for a in no_threshold.attempts] == ["lower", "kept"]


def test_show_marks_attempts_without_colour():
    request = request_of([attempt(accepted=False, committed=False, text=" bad", reward=-1.0), attempt(attempt=2)])
    lines = request_lines(request, Style(False), 80)
    assert any(line.startswith("x") and "bad" in line for line in lines)
    assert any(line.startswith("+") for line in lines)
    assert "\x1b" not in "".join(lines)
    assert "\x1b[2;9mbad\x1b[0m" in "".join(request_lines(request, Style(True), 80))


def test_show_hides_all_but_the_last_rejected():
    many = [attempt(attempt=n, accepted=False, committed=False, text=f" no{n}") for n in range(1, 9)]
    request = request_of([*many, attempt(attempt=9)])
    short, full = (" ".join(request_lines(request, Style(False), 80, every)) for every in (False, True))
    assert "no1" not in short and "5 more rejected" in short and "no8" in short
    assert "no1" in full


def test_no_text_can_steer_the_terminal():
    evil = "\x1b[2J\x07 \x9b31m \u202e\x00"
    lines = request_lines(request_of([attempt(text=evil)], prompt=evil, error=evil), Style(False), 80, True)
    assert not set("\x1b\x07\x9b\u202e\x00") & set("".join(lines))
    assert visible("a\tb\nc€") == "a\tb\nc€"


class Page(HTMLParser):
    """Collects the elements of a page and all text outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


def test_page_escapes_every_text():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;<!--\x00\x1b@BODY@\ud800"
    request = request_of([attempt(text=evil, accepted=False, committed=False), attempt(attempt=2, text=evil)],
                         prompt=evil, error=evil)
    request = replace(request, request_id=evil, policy={"name": evil, evil: evil}, params={evil: evil})
    text = page([request, request], evil)
    text.encode("utf8")
    shown = Page(text)
    tags = [tag for tag, _ in shown.tags]
    assert tags.count("script") == 1 and "img" not in tags
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    assert "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;<!--␀␛@BODY@?" in shown.text
    assert not any("src" in attributes or "http" in str(attributes.get("href")) for _, attributes in shown.tags)


def test_page_shows_every_attempt(outputs, engine):
    requests = [request_trace(output, engine.tokenizer, PARAMS) for output in outputs]
    shown = Page(page(requests, "trace"))
    attempts = sum(len(s.attempts) for r in requests for c in r.completions for s in c.segments)
    assert sum(tag == "li" for tag, _ in shown.tags) == attempts
    assert sum(attributes.get("role") == "button" for _, attributes in shown.tags) == sum(
        len(c.segments) for r in requests for c in r.completions)
    assert sum(tag == "option" for tag, _ in shown.tags) == len(requests) + 1


def test_page_of_edges():
    request = request_of([attempt(reward=-math.inf, threshold=-math.inf, margin=None)])
    for trace in ([], [request_of()], [request], [request_of([attempt(reward=None, threshold=None)])],
                  [request_of([attempt(text=None)], prompt=None)]):
        assert "</html>" in page(trace, "trace")
        for one in trace:
            assert request_lines(one, Style(True), 40, True)


SIGNS = ('"', "'", "<", ">", "&", "`", "=", "&quot;", "&#34;", "&amp;lt;", '" onfocus="alert(1)', "' onfocus='alert(1)",
         '"><b>', "</title>", "-->", "<!--", "\n", "\t", "@TITLE@", "é\u2028", "javascript:")


def attributes_of(text: str) -> Page:
    """The page of a trace with `text` in every place that a trace has."""
    request = request_of(
        [attempt(text=text, accepted=False, committed=False), attempt(attempt=2, text=text)],
        [attempt(segment=1, text=text, threshold=None, reward=None)], prompt=f"a{text}b", error=text)
    request = replace(request, request_id=text, policy={"name": text, text: text}, params={text: text})
    return Page(page([request, replace(request, request_id="other")], text))


@pytest.mark.parametrize("sign", SIGNS)
def test_attributes_hold_the_text_and_nothing_else(sign):
    """Parsed back, each attribute is the text itself; no text adds a tag, an attribute or ends one early."""
    shown, plain = attributes_of(sign), attributes_of("plain")
    assert [(tag, list(attributes)) for tag, attributes in shown.tags] == [
        (tag, list(attributes)) for tag, attributes in plain.tags]
    for (_, attributes), (_, expected) in zip(shown.tags, plain.tags, strict=True):
        for name, value in expected.items():
            assert attributes[name] == (value.replace("plain", sign) if value else value)
    labels = [attributes["aria-label"] for _, attributes in shown.tags if attributes.get("role") == "button"]
    facts = "segment 1, accepted, reward +0.50, threshold +0.25, attempt 2"
    assert labels == [f"{facts}: {sign}", f"segment 2, kept, reward –: {sign}"] * 2
    assert [attributes["title"] for tag, attributes in shown.tags if attributes.get("role") == "button"] == [
        facts, "segment 2, kept, reward –"] * 2
    sections = [attributes["aria-label"] for tag, attributes in shown.tags if tag == "section"]
    assert sections == [f"request {sign}", "request other"]


def test_control_characters_in_attributes_become_signs():
    labels = [attributes["aria-label"] for tag, attributes in attributes_of("a\x00\r\x1b\r\n\ud800").tags
              if tag == "section"]
    assert labels == ["request a␀␍␛\n?", "request other"]


@pytest.mark.parametrize(("line", "words"), [
    ("NaN", "NaN is no JSON number"), ("[-Infinity]", "-Infinity is no JSON number"), ("1e309", "1e309 is beyond"),
    ("-1e999", "-1e999 is beyond"), ("9" * 5000, "too many digits"), ("[" * 100_000, "nested too deep"),
    (b"\xff", "utf-8"), ("", "Expecting value"), ('{"a":1}x', "Extra data"), ("\ufeff1", "BOM"),
])
def test_lines_of_other_than_strict_json_are_refused(line, words):
    with pytest.raises(ValueError, match=words):
        loads(line)


def test_lines_of_strict_json_are_read():
    assert loads(b'{"a": [1e308, -0.0, 1e-999, "\\ud800", null]}\r\n') == {"a": [1e308, 0.0, 0.0, "\ud800", None]}
    assert loads("9" * 4000) == int("9" * 4000)
    for depth in (0, 1, 99, 100):
        assert not too_deep(nested(depth) if depth else 1)
        assert not too_deep({"a": nested(depth - 1)} if depth > 1 else "a")
    assert too_deep(nested(101)) and too_deep({"a": {"b": nested(99)}}) and too_deep([1, {"a": nested(500)}])
