"""`stars bench serve`: what it measures is what a server did, and what it says of that is right."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import random
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from statistics import fmean, median, pstdev

import numpy as np
import pytest

from scripted_server import ScriptedServer, chunk, event, head, reply, stream, text, usage
from stars.bench.answers import Answer
from stars.bench.arrivals import arrival_times
from stars.bench.client import Client
from stars.bench.figures import details, figures, header, is_good, most_at_once
from stars.bench.load import Run, Target, send_load
from stars.bench.meter import INTERVAL, Meter
from stars.bench.plot import even_axis, log_axis
from stars.bench.sse import EventParser
from stars.bench.workload import Entry, body_of, made_up, poisson, read_prompts, read_trace
from stars.cli import main
from stars.errors import RequestError

pytest.importorskip("aiohttp")
ALPHA = 1e-6  # false alarms of a statistical test, of which the seeds are fixed


def sent(server, entries, warmups=(), **options):
    """The run of a load on a scripted server."""
    async def run():
        async with server.running() as address:
            return await send_load(Target(address, **options), entries, warmups)

    return asyncio.run(run())


def at_once(count, prompt="x", max_tokens=8):
    return [Entry(0.0, prompt, max_tokens)] * count


# -- arrivals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("burstiness", "distribution"), [
    (1.0, lambda x: 1 - math.exp(-x)),
    (2.0, lambda x: 1 - math.exp(-x) * (1 + x)),
    (0.5, lambda x: math.erf(math.sqrt(x))),
])
def test_gaps_have_the_law_that_was_asked_for(burstiness, distribution):
    """Kolmogorov's test of the gaps, at ALPHA at most: that their mean is known brings them nearer to the law."""
    count, rate = 4000, 20.0
    gaps = np.diff([0.0, *arrival_times(count, rate, burstiness, seed=5)])
    law = np.array([distribution(gap * rate * burstiness) for gap in np.sort(gaps)])
    steps = np.arange(count + 1) / count
    distance = max(float(np.max(steps[1:] - law)), float(np.max(law - steps[:-1])))
    assert distance < math.sqrt(math.log(2 / ALPHA) / 2 / count)
    other = np.array([distribution(gap * rate * burstiness * 1.3) for gap in np.sort(gaps)])
    assert np.max(np.abs(steps[1:] - other)) > math.sqrt(math.log(2 / ALPHA) / 2 / count)  # it sees 30 %


def test_gaps_do_not_depend_on_the_gap_before():
    """Their correlation is normal with deviation 1 / sqrt(n) about, so that 4.9 of it are ALPHA."""
    gaps = np.diff(arrival_times(4000, 3.0, 1.0, seed=2))
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4.9 / math.sqrt(len(gaps))


def test_arrivals_begin_and_end_where_they_should():
    times = arrival_times(50, 4.0, 1.0, seed=1)
    assert times == sorted(times) and times[-1] == pytest.approx(12.5) and times[0] > 0
    assert times == arrival_times(50, 4.0, 1.0, seed=1) != arrival_times(50, 4.0, 1.0, seed=2)
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0] * 3
    assert arrival_times(4, 2.0, math.inf, 0) == pytest.approx([0.5, 1.0, 1.5, 2.0])


# -- event streams ----------------------------------------------------------------------------------------------------


EVENTS = ['{"text": "é — 中"}', "two\nlines", "", "[DONE]"]
BODY = (": a comment\ndata: {\"text\": \"é — 中\"}\n\nevent: other\r\ndata:two\r\ndata: lines\r\n"
        "\r\nid: 3\rdata\r\r: x\n\n\ndata: [DONE]\n\ndata: cut off").encode()


def test_events_are_read_whole_wherever_they_are_cut():
    for cut in range(len(BODY) + 1):
        parser = EventParser()
        assert [*parser.feed(BODY[:cut]), *parser.feed(BODY[cut:])] == EVENTS, BODY[:cut]
    parser = EventParser()
    assert [one for index in range(len(BODY)) for one in parser.feed(BODY[index : index + 1])] == EVENTS


@pytest.mark.parametrize("piece", [b"x" * 1024, b"data: %b\n" % (b"x" * 1017)], ids=["a line", "lines"])
def test_an_event_that_does_not_end_is_not_kept(piece):
    """And takes no longer to read the longer it is: a reader that copies what it has reads 100 GB."""
    parser, begin = EventParser(), time.perf_counter()
    with pytest.raises(ValueError, match="more than 16777216 bytes"):
        for _ in range(20_000):
            assert not list(parser.feed(piece))
    assert time.perf_counter() - begin < 5  # a twentieth of a second; a machine may stand still for some
    for size in (1 << 20, (1 << 24) - 8):
        [data] = EventParser().feed(b"data: " + b"x" * size + b"\n\n")
        assert len(data) == size


@pytest.mark.parametrize(("answer", "error"), [
    ([head(), chunk(event("[" * 200_000))], "an event that is no completion: [[["),
    ([reply(400, {})[:40] + b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000], "400: [[["),
    ([head(), *[chunk(b"x" * (1 << 20))] * 20], "an event has more than"),
    ([b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk(b"x" * (1 << 20))] * 100], "500: xxx"),
    ([head(), chunk(text("a", "stop") + event({"usage": {"completion_tokens": "4"}}))], "an event that is no comp"),
    ([head(), chunk(text("a", "stop") + event({"usage": {"completion_tokens": -4}}))], "an event that is no comp"),
    ([head(), chunk(text("a", "stop") + event('{"usage": {"prompt_tokens": NaN}}'))], "an event that is no comp"),
], ids=["nested", "nested error", "endless event", "endless error", "text", "negative", "no number"])
def test_a_server_that_says_what_it_likes_fails_its_own_requests(answer, error):
    run = sent(ScriptedServer(lambda index: [*answer, chunk(b""), None]), at_once(1))
    assert run.answers[0].error.startswith(error)
    assert figures(run, {})["failed"] == 1


def test_a_stream_in_splinters_is_one_answer():
    body = text("é") + text("中", "stop", accept_rate=0.5, attempts=6) + usage(3, 2) + event("[DONE]")

    def splinters(index):
        draw = random.Random(index)
        places = sorted(draw.sample(range(1, len(body)), 20))
        yield head()
        for begin, end in zip([0, *places], [*places, len(body)], strict=True):
            yield chunk(body[begin:end])
            yield draw.choice([0.0, 0.001])
        yield chunk(b"")

    run = sent(ScriptedServer(splinters), at_once(20))
    assert {(one.outcome, one.text, one.finish_reason, one.input_tokens, one.output_tokens)
            for one in run.answers} == {("completed", "é中", "stop", 3, 2)}
    assert run.answers[0].stars == {"accept_rate": 0.5, "attempts": 6}


# -- times ------------------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_server():
    """Client and server share a clock and an event loop. What is written cannot be read before, and is read once the
    loop comes round, twice at most: each time it can be late by what the meter saw, or by its interval."""
    server = ScriptedServer(lambda index: stream([0.12, 0.05, 0.08, 0.0, 0.06]))
    run = sent(server, poisson(["x"], 8, 20.0, 1.0, 3, 8))
    slack = 3 * (max(run.meter.lags) + INTERVAL)
    for asked, answer in zip(server.asked, run.answers, strict=True):
        first, *_, last = written = asked.written[1:]  # without the head
        assert answer.ttft >= 0.12 and 0 <= answer.ttft - (first - asked.at) < slack
        assert answer.e2el >= 0.31 and 0 <= answer.e2el - (last - asked.at) < slack
        assert len(answer.times) == 5 and answer.sent >= answer.due
        gaps = [after - before for before, after in zip(written, written[1:], strict=False)][:4]
        assert answer.gaps == pytest.approx(gaps, abs=slack)
        assert answer.tpot == pytest.approx((answer.e2el - answer.ttft) / 7)
    assert run.duration >= max(answer.ended for answer in run.answers)


def test_requests_are_sent_when_they_are_due_whatever_the_server_does():
    server = ScriptedServer(lambda index: stream([0.8]))
    entries = [Entry(due, "x", 4) for due in (0.0, 0.05, 0.1, 0.15)]
    run = sent(server, entries)
    slack = max(run.meter.lags) + 2 * INTERVAL
    assert all(0 <= answer.sent - answer.due < slack for answer in run.answers)
    assert server.most_under_way == 4
    found = figures(run, {})
    assert found["max_concurrent_requests"] == 4 and found["max_slip_ms"] < 1e3 * slack


def test_max_concurrency_holds_the_rest_back_and_says_so():
    server = ScriptedServer(lambda index: stream([0.1]))
    run = sent(server, at_once(6), max_concurrency=2)
    found = figures(run, {})
    assert server.most_under_way == found["max_concurrent_requests"] == 2
    assert found["sent_late"] >= 4 and found["max_slip_ms"] >= 200
    assert found["p99_ttft_ms"] < 1e3 * (0.1 + 3 * (max(run.meter.lags) + INTERVAL))  # from sending, as vLLM has it


def test_a_busy_client_is_seen():
    async def busy():
        meter = Meter()
        async with meter.measuring():
            await asyncio.sleep(3 * INTERVAL)
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
            await asyncio.sleep(3 * INTERVAL)
        return meter

    meter = asyncio.run(busy())
    assert max(meter.lags) > 0.3 - INTERVAL and meter.cpu >= 0.3 and meter.wall >= 0.3 + 6 * INTERVAL
    assert meter.cpu_share == pytest.approx(meter.cpu / meter.wall)


# -- what becomes of requests -----------------------------------------------------------------------------------------


def fates(index):
    """Twelve kinds of answers."""
    kind = index % 12
    if kind == 0:
        return [reply(429, {"error": {"message": "the queue is full"}}, Retry_After="1")]
    if kind == 1:
        return [reply(503, {"error": {"message": "shutting down"}}), None]
    if kind == 2:
        return [reply(400, {"error": {"message": "top_p is 7"}})]
    if kind == 3:
        return [head(), chunk(text("a")), None]  # in the midst, after a piece
    if kind == 4:
        return [None]  # at once
    if kind == 5:
        return [head(), chunk(text("a")), 5.0]  # never goes on
    if kind == 6:
        return [5.0]  # never begins
    if kind == 7:
        return [head(), chunk(text("a")), chunk(event({"error": {"message": "the engine died"}})),
                chunk(event("[DONE]")), chunk(b"")]
    if kind == 8:
        return [head(), chunk(text("a")), chunk(b"")]  # a whole body, and no end of the answer
    if kind == 9:
        return [head(), chunk(text("a", "stop")), chunk(b"")]  # servers without [DONE]
    if kind == 10:
        return [head(), chunk(event("{broken")), chunk(event("[DONE]")), chunk(b"")]
    return stream([0.0, 0.0])


def test_every_request_is_told_of_once():
    server = ScriptedServer(fates)
    run = sent(server, [Entry(0.01 * index, "x", 4) for index in range(36)], timeout=2.0)
    found = figures(run, {})
    assert (found["sent"], found["completed"], found["refused"], found["failed"]) == (36, 6, 6, 24)
    assert found["completed"] + found["refused"] + found["failed"] == len(server.asked) == 36
    assert found["statuses"] == {"200": 21, "400": 3, "429": 3, "503": 3}
    assert found["refusals_with_retry_after"] == 3
    assert found["failures"]["timeout"] == 6 and found["failures"]["400: top_p is 7"] == 3
    assert found["failures"]["in the stream: the engine died"] == 3
    assert found["failures"]["the stream broke off"] == 3
    assert found["failures"]["an event that is no completion: {broken"] == 3
    assert sum(found["failures"].values()) == 24
    assert found["answers_without_usage"] == 3  # those without [DONE]
    for answer, outcome in zip(run.answers, details(run)["outcomes"], strict=True):
        assert answer.ended is not None and answer.outcome == outcome
        assert answer.e2el < 2.0 + 3 * (max(run.meter.lags) + INTERVAL)  # the timeout ends those that hang


def test_a_server_that_is_not_there_fails_every_request():
    async def run():
        async with ScriptedServer(fates).running() as address:
            pass
        return await send_load(Target(address, model="m"), at_once(5))

    run = asyncio.run(run())
    assert figures(run, {})["failed"] == 5 and all(answer.status is None for answer in run.answers)


def test_an_address_may_end_as_openais_clients_are_given_it():
    async def addresses(base_url):
        async with Client(base_url, "/v1/completions", 1.0) as client:
            return client.url, client.models_url

    wanted = "http://here:1/v1/completions", "http://here:1/v1/models"
    for base_url in ("http://here:1", "http://here:1/", "http://here:1/v1", "http://here:1/v1/"):
        assert asyncio.run(addresses(base_url)) == wanted


def test_what_is_no_stream_is_no_answer():
    run = sent(ScriptedServer(lambda index: [reply(200, {"choices": [{"text": "whole"}]})]), at_once(1))
    assert run.answers[0].error == "the answer is no event stream, but application/json"


# -- figures ----------------------------------------------------------------------------------------------------------


def answer(sent_at, first, gaps, tail, tokens, **other):
    times = [sent_at + first]
    for gap in gaps:
        times.append(times[-1] + gap)
    return Answer(sent_at - 0.001, sent_at, times, times[-1] + tail, 200, None, input_tokens=10, output_tokens=tokens,
                  finish_reason="length", **other)


def run_of(answers, duration=10.0):
    meter = Meter()
    meter.wall, meter.cpu, meter.lags = 10.0, 2.5, [0.001, 0.003]
    return Run("toy", answers, duration, meter)


def test_figures_by_hand():
    answers = [answer(0.0, 0.1, [0.2], 0.0, 5, stars={"accept_rate": 0.25, "attempts": 8, "reward": 1.0}),
               answer(1.0, 0.3, [0.1, 0.3], 0.1, 9, stars={"accept_rate": 0.75, "attempts": 4, "reward": 2.0}),
               answer(2.0, 0.2, [], 0.0, 1),
               Answer(3.0, 3.0, [], 3.1, 429, "429: full", retry_after=True),
               Answer(4.0, 4.0, [4.5, 4.9], 5.0, 200, "the stream broke off", output_tokens=3)]
    found = figures(run_of(answers), {"ttft": 250.0, "tpot": 60.0})
    assert (found["completed"], found["refused"], found["failed"], found["sent"]) == (3, 1, 1, 5)
    assert found["request_throughput"] == pytest.approx(0.3) and found["output_throughput"] == pytest.approx(1.5)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 15)
    assert found["total_token_throughput"] == pytest.approx(4.5)
    assert found["mean_ttft_ms"] == pytest.approx(200) and found["median_ttft_ms"] == pytest.approx(200)
    assert found["std_ttft_ms"] == pytest.approx(pstdev([100, 200, 300]))
    assert found["mean_itl_ms"] == pytest.approx(200)  # 200, 100, 300: of three completed ones, not of the broken one
    assert found["mean_tpot_ms"] == pytest.approx((200 / 4 + 500 / 8) / 2)
    assert found["mean_e2el_ms"] == pytest.approx((300 + 800 + 200) / 3)
    assert found["request_goodput"] == pytest.approx(0.2)  # the first, and the third, of one token
    assert found["mean_accept_rate"] == 0.5 and found["mean_attempts"] == 6 and found["mean_reward"] == 1.5
    assert found["client_cpu_share"] == 0.25 and found["max_loop_lag_ms"] == pytest.approx(3)
    assert found["output_tokens"] == {"min": 1, "median": 5, "p90": 9, "max": 9}
    assert found["mean_slip_ms"] == pytest.approx(0.6)


def test_goals_are_met_at_their_bound_and_not_beyond():
    one = answer(0.0, 0.25, [0.5], 0.0, 3)  # 250 ms, 250 ms a token, 750 ms
    assert is_good(one, {"ttft": 250.0, "tpot": 250.0, "e2el": 750.0})
    for name, bound in (("ttft", 249.9), ("tpot", 249.9), ("e2el", 749.9)):
        assert not is_good(one, {"ttft": 250.0, "tpot": 250.0, "e2el": 750.0, name: bound})


def test_percentiles_are_numpys():
    draw = np.random.default_rng(1)
    firsts, gaps = draw.exponential(0.2, 173), [list(draw.exponential(0.05, 4)) for _ in range(173)]
    answers = [answer(0.1 * index, first, gap, 0.0, 9) for index, (first, gap) in enumerate(zip(firsts, gaps,
                                                                                                strict=True))]
    found = figures(run_of(answers), {})
    flat = [one for gap in gaps for one in gap]
    for share in (50, 90, 99):
        assert found[f"p{share}_ttft_ms"] == pytest.approx(1e3 * np.percentile(firsts, share))
        assert found[f"p{share}_itl_ms"] == pytest.approx(1e3 * np.percentile(flat, share))
    assert found["mean_itl_ms"] == pytest.approx(1e3 * fmean(flat))
    assert found["median_ttft_ms"] == found["p50_ttft_ms"] == pytest.approx(1e3 * median(firsts))


def test_nothing_measured_is_no_number():
    found = figures(run_of([Answer(0.0, 0.0, [], 0.1, 429, "429: full")]), {"ttft": 5.0})
    assert found["mean_ttft_ms"] is None and found["p99_e2el_ms"] is None and found["output_throughput"] is None
    assert found["request_goodput"] == 0.0 and found["output_tokens"]["median"] is None


def test_who_ends_as_another_begins_is_not_beside_it():
    assert most_at_once([answer(0.0, 1.0, [], 0.0, 1), answer(1.0, 1.0, [], 0.0, 1)]) == 1
    assert most_at_once([answer(0.0, 1.0, [], 0.5, 1), answer(1.0, 1.0, [], 0.0, 1), answer(1.2, 0.1, [], 0.0, 1)]) == 3


def test_result_files_have_vllms_keys():
    measured = [f"{what}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")
                for what in ("mean", "median", "std", "p50", "p90", "p99")]
    keys = {"date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency", "duration",
            "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
            "output_throughput", "total_token_throughput", "max_concurrent_requests", "endpoint_type", "label",
            "tokenizer_id", *measured}
    run = run_of([answer(0.0, 0.1, [0.2], 0.0, 5)])
    found = header(run, backend="openai", endpoint="/v1/completions", request_rate=math.inf, burstiness=1.0,
                   max_concurrency=None) | figures(run, {})
    assert keys <= set(found) and found["request_rate"] == "inf"
    assert {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"} <= set(details(run))


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_bodies_are_those_of_the_api():
    body = json.loads(body_of(Entry(0.0, "Why?", 5), "/v1/completions", "m", {"stars": {"policy": "plain"}}))
    assert body == {"model": "m", "prompt": "Why?", "max_tokens": 5, "stream": True,
                    "stream_options": {"include_usage": True}, "stars": {"policy": "plain"}}
    assert json.loads(body_of(Entry(0.0, [1, 2], None), "/v1/completions", "m", {}))["prompt"] == [1, 2]
    turns = [{"role": "system", "content": "Be brief"}]
    for prompt, messages in (("Why?", [{"role": "user", "content": "Why?"}]), (turns, turns)):
        assert json.loads(body_of(Entry(0.0, prompt, 5), "/v1/chat/completions", "m", {}))["messages"] == messages
    with pytest.raises(RequestError, match="/v1/chat/completions"):
        body_of(Entry(0.0, turns, 5), "/v1/completions", "m", {})
    with pytest.raises(RequestError, match="token ids"):
        body_of(Entry(0.0, [1, 2], 5), "/v1/chat/completions", "m", {})


def test_prompts_of_files(tmp_path):
    rows = ["plain", {"prompt": "row", "chosen": "x"}, {"messages": [{"role": "user", "content": "turn"}]},
            {"prompt_token_ids": [3, 4]}]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "c.txt").write_text("one\n\n  two \n")
    expected = ["plain", "row", [{"role": "user", "content": "turn"}], [3, 4]]
    assert read_prompts(str(tmp_path / "a.jsonl")) == read_prompts(str(tmp_path / "b.jsonl.gz")) == expected
    assert read_prompts(str(tmp_path / "c.txt")) == ["one", "two"]
    (tmp_path / "d.jsonl").write_text('"fine"\n{"text": "x"}\n')
    with pytest.raises(RequestError, match="d.jsonl: line 2"):
        read_prompts(str(tmp_path / "d.jsonl"))
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(RequestError, match="no prompts"):
        read_prompts(str(tmp_path / "e.txt"))


def test_made_up_prompts_have_their_length_and_their_seed():
    prompts = made_up(12, 40, seed=1)
    assert {len(prompt.split()) for prompt in prompts} == {12} and len(set(prompts)) == 40
    assert prompts == made_up(12, 40, seed=1) != made_up(12, 40, seed=2)
    assert Counter(len(prompt.split()) for prompt in made_up(1, 40, seed=1)) == {1: 40}


def test_a_trace_is_sent_as_it_was_recorded(tmp_path):
    rows = [{"timestamp": 1000.2, "prompt_tokens": 5, "max_tokens": 3}, {"timestamp": 1000.0, "prompt": "first"},
            {"timestamp": 1000.1, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    entries = read_trace(str(path), 9, 0)
    assert [entry.due for entry in entries] == pytest.approx([0.0, 0.1, 0.2])
    assert [entry.max_tokens for entry in entries] == [9, 2, 3]
    assert entries[0].prompt == "first" and len(entries[2].prompt.split()) == 5
    for row, word in (('{"prompt": "x"}', "timestamp"), ('{"timestamp": 1, "prompt_tokens": 0}', "prompt_tokens"),
                      ('{"timestamp": 1, "prompt": "x", "max_tokens": true}', "max_tokens"), ("[1]", "object"),
                      ('{"timestamp": NaN, "prompt": "x"}', "timestamp"), ("{", "no JSON")):
        path.write_text(row)
        with pytest.raises(RequestError, match=f"line 1.*{word}"):
            read_trace(str(path), 9, 0)


# -- the plot ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.1, 3000.0], [5.0], [0.0, 1e-4], [1e-3, 1e7], [10.0, 10.0]])
def test_a_logarithmic_axis_holds_its_values(values):
    axis = log_axis("ms", values)
    assert axis.low <= min(value for value in values if value > 0) <= max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 12 and all(axis.low <= mark <= axis.high for mark, _ in axis.ticks)
    assert 0 <= axis.share(values[-1]) <= 1 and axis.share(axis.low) == 0 and axis.share(axis.high) == 1


def test_an_even_axis_holds_its_values():
    for low, high in ((0.0, 5.3), (10.0, 120.0), (0.0, 0.0)):
        axis = even_axis("s", low, high)
        assert axis.low <= low <= high <= axis.high and axis.low < axis.high and 2 <= len(axis.ticks) <= 9


# -- the command ------------------------------------------------------------------------------------------------------


class Served:
    """A scripted server in a thread of its own, for commands that run in this one."""

    def __init__(self, script):
        self.server, self.loop, ready = ScriptedServer(script), asyncio.new_event_loop(), threading.Event()

        async def serve():
            async with self.server.running() as self.address:
                self.end = asyncio.Event()
                ready.set()
                await self.end.wait()

        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(serve()))
        self.thread.start()
        ready.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.end.set)
        self.thread.join()
        self.loop.close()


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    saved, plot = tmp_path / "run.json", tmp_path / "run.svg"
    with Served(lambda index: [reply(429, {})] if index == 5 else stream([0.01, 0.02], accept_rate=0.5,
                                                                         attempts=4)) as served:
        assert main(["bench", "serve", "--base-url", served.address, "--num-prompts", "20", "--request-rate", "200",
                     "--max-tokens", "8", "--temperature", "0.5", "--ignore-eos", "--num-warmups", "2",
                     "--request-seeds", "--seed", "4", "--api-key-env", "A_KEY", "--goodput", "ttft:5000", "e2el:9000",
                     "--extra-body", '{"stars": {"policy": "plain"}}', "--random-input-len", "6", "--save", str(saved),
                     "--save-detailed", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "20 sent at 200 requests/s" in out and "19 completed, 1 refused (429, 503), 0 failed" in out
    assert "time to first segment" in out and "accept rate 0.500, 4.0 attempts" in out
    assert ", requests " in out and "ms late (99th percentile)" in out
    found = json.loads(saved.read_text())
    assert (found["completed"], found["refused"], found["model_id"], found["backend"]) == (19, 1, "toy", "openai")
    assert found["request_goodput"] == pytest.approx(19 / found["duration"]) and found["offered_rate"] == 200
    assert len(found["ttfts"]) == 20 and found["generated_texts"][0] == "0 1 "
    bodies = [asked.body for asked in served.server.asked]
    assert len(bodies) == 22 and all("Authorization: Bearer secret" in asked.head for asked in served.server.asked)
    assert "seed" not in bodies[0] and sorted(body["seed"] for body in bodies[2:]) == list(range(4, 24))
    assert len({body["prompt"] for body in bodies}) == 22  # those of the warm-up are not asked again
    assert all(body["stars"] == {"policy": "plain"} and body["ignore_eos"] and body["temperature"] == 0.5
               and body["max_tokens"] == 8 and body["model"] == "toy" and len(body["prompt"].split()) == 6
               for body in bodies)
    tree = ElementTree.fromstring(plot.read_text())
    assert tree.tag.endswith("svg") and "prefers-color-scheme:dark" in plot.read_text()
    assert sum(element.tag.endswith("circle") for element in tree.iter()) == 2 * 19


def test_who_waits_for_a_turn_of_a_closed_loop_is_not_late(capsys):
    with Served(lambda index: stream([0.05])) as served:
        assert main(["bench", "serve", "--base-url", served.address, "--num-prompts", "4", "--model", "toy",
                     "--max-concurrency", "1"]) == 0
    told = capsys.readouterr()
    assert "event loop" in told.out and ", requests " not in told.out
    assert "sent late" not in told.err  # its event loop may be, where the machine has much to do


def test_the_command_sends_a_trace(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"timestamp": 0.05 * index, "prompt": f"p{index}"}) + "\n"
                             for index in range(4)))
    with Served(lambda index: stream([0.0])) as served:
        assert main(["bench", "serve", "--base-url", served.address + "/", "--trace", str(trace), "--num-prompts", "3",
                     "--model", "m", "--save", "-", "--save-detailed"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["request_rate"] == "trace" and found["num_prompts"] == 3 and "3 sent at the trace's times" in told.err
    assert [asked.body["prompt"] for asked in served.server.asked] == ["p0", "p1", "p2"]
    assert all(begin >= 0.05 * index for index, begin in enumerate(found["start_times"]))


def test_nothing_answered_is_a_failure(capsys):
    with Served(lambda index: [reply(400, {"error": {"message": "no such model"}})]) as served:
        assert main(["bench", "serve", "--base-url", served.address, "--num-prompts", "3"]) == 1
        served.server.models = reply(401, {"error": {"message": "a key is needed"}})
        assert main(["bench", "serve", "--base-url", served.address, "--num-prompts", "3"]) == 1
        served.server.models = reply(200, {"data": []})
        assert main(["bench", "serve", "--base-url", served.address, "--num-prompts", "3"]) == 1
    assert main(["bench", "serve", "--base-url", served.address, "--num-prompts", "3"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stars: error: ")]
    assert [word in error for word, error in zip(("none of 3 requests was answered: 400: no such model",
                                                  "answers 401 (a key is needed): give --api-key", "names no model",
                                                  "is a server there?"), errors, strict=True)] == [True] * 4


@pytest.mark.parametrize(("arguments", "code", "word"), [
    (["--input", "f", "--trace", "g"], 2, "--trace and --input"),
    (["--trace", "g", "--request-rate", "3"], 2, "--request-rate"),
    (["--max-tokens", "3", "--random-output-len", "3"], 2, "--random-output-len"),
    (["--save-detailed"], 2, "--save-detailed"),
    (["--ignore-eos"], 2, "--max-tokens"),
    (["--goodput", "itl:3"], 2, "ttft, tpot, e2el; such as ttft:500"),
    (["--goodput", "ttft:x"], 2, "--goodput"),
    (["--extra-body", "[1]"], 2, "--extra-body"),
    (["--endpoint", "/v1/embeddings"], 2, "--endpoint"),
    (["--num-prompts", "0"], 1, "--num-prompts is 0"),
    (["--request-rate", "nan"], 1, "--request-rate is nan"),
    (["--base-url", "localhost:8000"], 1, "--base-url is 'localhost:8000'"),
    (["--api-key-env", "NO_SUCH_VARIABLE"], 1, "NO_SUCH_VARIABLE"),
    (["--input", "no-such-file.jsonl"], 1, "no-such-file.jsonl"),
    (["--save", "no/such/place.json"], 1, "no/such/place.json"),
])
def test_wrong_flags_are_refused_by_name(arguments, code, word, capsys):
    try:
        assert main(["bench", "serve", *arguments]) == code
    except SystemExit as error:
        assert error.code == code
    assert word in capsys.readouterr().err


def test_without_aiohttp_it_says_what_to_install():
    program = ("import sys, importlib.util as util\nreal = util.find_spec\n"
               "util.find_spec = lambda name, *rest: None if name == 'aiohttp' else real(name, *rest)\n"
               "from stars.cli import main\nsys.exit(main(['bench', 'serve']))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "pip install 'stars-engine[bench]'" in done.stderr


def test_a_client_that_is_too_slow_says_so():
    from stars.cli.bench import warnings_of

    found = figures(run_of([answer(0.0, 0.1, [0.2], 0.0, 5)]), {})
    assert warnings_of(found, True) == []
    [warning] = warnings_of(found | {"client_cpu_share": 0.9, "p99_loop_lag_ms": 40.0, "sent_late": 1}, True)
    assert "90% of a core" in warning and "40 ms" in warning and "sent late" in warning
    assert warnings_of(found | {"sent_late": 1}, False) == []  # where it holds them back by itself


def test_stars_serve_is_measured(tmp_path, one_torch_thread):
    """With more clients than the server lets in: refusals are told apart, and segments are those of the server."""
    from serving_http import running_server, service_of_pair
    from stars.serve.http.settings import ServerSettings

    saved, body = tmp_path / "run.json", {"stars": {"policy": "stars", "segment_size": 4, "max_attempts": 3,
                                                    "reward_threshold": 0.5, "beta": 0.5}}
    with service_of_pair(ServerSettings("pair"), max_waiting=2, max_num_seqs=2) as service:
        with running_server(service) as server:
            assert main(["bench", "serve", "--base-url", server.url, "--num-prompts", "24", "--random-input-len", "5",
                         "--max-tokens", "12", "--ignore-eos", "--request-seeds", "--extra-body", json.dumps(body),
                         "--save", str(saved), "--save-detailed"]) == 0
    found = json.loads(saved.read_text())
    assert found["model_id"] == "pair" and found["failed"] == 0
    assert found["completed"] >= 4 and found["refused"] == 24 - found["completed"] == found["statuses"].get("429", 0)
    assert found["refusals_with_retry_after"] == found["refused"]
    assert found["total_output_tokens"] == 12 * found["completed"] and found["input_tokens"]["min"] >= 5
    assert 0 < found["mean_accept_rate"] <= 1 and 3 <= found["mean_attempts"] <= 9
    events = [1 + len(gaps) for gaps, outcome in zip(found["itls"], found["outcomes"], strict=True)
              if outcome == "completed"]
    assert min(events) >= 1 and max(events) == 3  # segments of 4 tokens; a slow reader is given two at once
