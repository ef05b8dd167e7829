"""OpenTelemetry spans: one a request, made at its end, with what the outputs say."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import stars
import stars.engine
from stars import spans
from toy import Digits, ToyModel, ids, table_reward, toy_engine

trace = pytest.importorskip("opentelemetry.trace")
sdk = pytest.importorskip("opentelemetry.sdk.trace")
exports = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.filterwarnings("ignore:reward_threshold")]

LM = ToyModel(vocab=5, seed=1, layers=1, positions=96)
REWARD = table_reward(seed=3)
POLICIES = [
    stars.STARS(4, 6, 0.5, 0.3, 1.0), stars.STARS(3, 2, 1.0, 0.0, 3.0, width=1, exhaust="back_up:2"),
    stars.Sample(), stars.BestOfN(3), stars.RejectionSampling(9.0, 0.3, 3, exhaust="refuse"),
    stars.SegmentBeam(2, 2, 4), stars.ParticleFilter(3, 0.5, 4)]
PROMPT = {"prompt_token_ids": ids(9)}
SHORT = stars.SamplingParams(max_tokens=4)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def rewards(prompt, responses):
    return [REWARD(response) for response in responses]


@pytest.fixture
def exporter():
    return memory.InMemorySpanExporter()


@pytest.fixture
def provider(exporter):
    provider = sdk.TracerProvider()
    provider.add_span_processor(exports.SimpleSpanProcessor(exporter))
    return provider


def engine(provider, fn=rewards, **options) -> stars.Engine:
    return toy_engine(LM, stars.FunctionReward(fn, inputs="ids"), tracer_provider=provider, **options)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_span_says_what_the_output_says(provider, exporter, policy):
    begin = time.time_ns()
    params = stars.SamplingParams(max_tokens=15, seed=4, n=2, temperature=0.9, top_p=0.95, top_k=4, stop=["44"],
                                  frequency_penalty=0.1, presence_penalty=0.2)
    [output] = engine(provider, tokenizer=Digits()).generate(PROMPT, params, policy, use_tqdm=False)
    end = time.time_ns()
    [span] = exporter.get_finished_spans()
    metrics, times = output.metrics, output.times
    wanted = {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "stars", "gen_ai.request.model": "llama",
        "gen_ai.request.max_tokens": 15, "gen_ai.request.temperature": 0.9, "gen_ai.request.top_p": 0.95,
        "gen_ai.request.top_k": 4, "gen_ai.request.frequency_penalty": 0.1, "gen_ai.request.presence_penalty": 0.2,
        "gen_ai.request.seed": 4, "gen_ai.request.choice.count": 2, "gen_ai.request.stop_sequences": ("44",),
        "gen_ai.response.id": output.request_id, "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": sum(len(one.token_ids) for one in output.outputs),
        "gen_ai.response.finish_reasons": tuple(one.finish_reason for one in output.outputs),
        "gen_ai.latency.time_in_queue": times.admitted, "gen_ai.latency.e2e": times.finished,
        "gen_ai.latency.time_in_model_prefill": times.prefilled - times.admitted,
        "stars.policy": type(policy).__name__, "stars.segments": metrics.segments, "stars.attempts": metrics.attempts,
        "stars.fallbacks": metrics.fallbacks, "stars.lm_tokens_drawn": metrics.lm_tokens_drawn,
        "stars.rm_tokens_scored": metrics.rm_tokens_scored, "stars.lm_seconds": metrics.lm_seconds,
        "stars.rm_seconds": metrics.rm_seconds, "stars.num_preemptions": 0}
    if metrics.accept_rate is not None:
        wanted["stars.accept_rate"] = metrics.accept_rate
    if times.first_segment is not None:
        wanted |= {"gen_ai.latency.time_to_first_token": times.first_segment,
                   "gen_ai.latency.time_in_model_decode": times.last_segment - times.prefilled,
                   "gen_ai.latency.time_in_model_inference": times.last_segment - times.admitted}
    assert dict(span.attributes) == wanted
    assert span.name == "text_completion llama" and span.kind is trace.SpanKind.INTERNAL and span.parent is None
    assert span.status.status_code is trace.StatusCode.UNSET
    slack = 10**6  # the two clocks may drift apart by less than a millisecond meanwhile
    assert begin - slack <= span.start_time < span.end_time <= end + slack
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(times.finished, abs=1e-6)
    assert [(event.name, dict(event.attributes)) for event in span.events] == [
        (spans.SEGMENT, {"completion": one.index, "index": index, "tokens": len(segment.token_ids),
                         "attempts": len(segment.attempts), "accepted": segment.accepted,
                         **({"reward": segment.reward} if segment.reward is not None else {})})
        for one in output.outputs for index, segment in enumerate(one.segments)]
    moments = [(event.timestamp - span.start_time) / 1e9 for event in span.events]
    if moments:
        assert min(moments) == pytest.approx(times.first_segment, abs=1e-6)
        assert max(moments) == pytest.approx(times.last_segment, abs=1e-6)


def test_errors_and_aborts(provider, exporter):
    def broken(prompt, responses):
        raise RuntimeError("the reward fell over")

    made = engine(provider, broken)
    made.add_request(PROMPT, SHORT, POLICIES[0], request_id="a")
    while made.has_unfinished_requests():
        made.step()
    made.add_request(PROMPT, SHORT, request_id="b", user="somebody")
    made.abort("b")
    failed, aborted = exporter.get_finished_spans()
    assert failed.status.status_code is trace.StatusCode.ERROR and "the reward fell over" in failed.status.description
    assert failed.attributes["error.type"] == "_OTHER"
    assert failed.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert aborted.status.status_code is trace.StatusCode.UNSET and "error.type" not in aborted.attributes
    assert aborted.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert aborted.attributes["user.id"] == "somebody" and aborted.attributes["gen_ai.usage.output_tokens"] == 0
    assert not aborted.events and "gen_ai.latency.time_in_queue" not in aborted.attributes


def test_chats_are_named_so(provider, exporter):
    made = engine(provider)
    made.add_request(PROMPT, SHORT, request_id="a")
    made._requests["a"].prompt = made._requests["a"].prompt._replace(given=[{"role": "user", "content": "4"}])
    made.abort("a")
    [span] = exporter.get_finished_spans()
    assert span.name == "chat llama" and span.attributes["gen_ai.operation.name"] == "chat"


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
def test_the_parent_is_that_of_the_headers(provider, exporter, name):
    made = engine(provider)
    made.add_request(PROMPT, SHORT, trace_headers={name: TRACEPARENT, "other": "x"})
    while made.has_unfinished_requests():
        made.step()
    [span] = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACEPARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == TRACEPARENT.split("-")[2] and span.parent.is_remote


def test_without_headers_the_parent_is_the_callers_span(provider, exporter):
    made = engine(provider)
    with provider.get_tracer("test").start_as_current_span("caller") as caller:
        made.generate(PROMPT, SHORT, use_tqdm=False)
        stream = made.stream(PROMPT, stars.SamplingParams(max_tokens=4, ignore_eos=True))
        made.add_request(PROMPT, SHORT)
    while made.has_unfinished_requests():  # by somebody else
        made.step()
    assert list(stream)
    first, _, second, third = exporter.get_finished_spans()
    assert {one.parent.span_id for one in (first, second, third)} == {caller.get_span_context().span_id}


@pytest.mark.parametrize("given", ["traceparent", [TRACEPARENT], {"traceparent": 1}, {1: TRACEPARENT}])
def test_headers_that_are_none_are_refused(given):
    with pytest.raises(stars.RequestError, match="^trace_headers is .*, it must be a dictionary of texts"):
        engine(None).add_request(PROMPT, trace_headers=given)


@pytest.mark.parametrize("call", ["generate", "add", "add_nowait"])
def test_spans_of_an_async_engine_belong_to_headers_or_to_the_task(provider, exporter, call):
    """To the span of the task that asks, though another thread makes it."""
    async def serve():
        async with stars.AsyncEngine(engine(provider)) as served:
            async def one(**options):
                found = getattr(served, call)(PROMPT, SHORT, **options)
                return [output async for output in (found if call == "generate" else await found)][-1].request_id

            async def within(name):
                with provider.get_tracer("test").start_as_current_span(name) as caller:
                    return await one(), caller.get_span_context().span_id

            wanted = dict(await asyncio.gather(within("first"), within("second")))
            wanted[await one(trace_headers={"traceparent": TRACEPARENT})] = int(TRACEPARENT.split("-")[2], 16)
            with pytest.raises(stars.RequestError, match="^trace_headers is"):
                await one(trace_headers="traceparent")
        found = {span.attributes["gen_ai.response.id"]: span.parent.span_id for span in exporter.get_finished_spans()
                 if "gen_ai.response.id" in span.attributes}
        assert found == wanted and len(set(found.values())) == 3

    asyncio.run(asyncio.wait_for(serve(), 60))


def test_headers_are_taken_without_spans_too():
    engine(None).add_request(PROMPT, SHORT, trace_headers={"traceparent": TRACEPARENT})
    with pytest.raises(stars.RequestError, match="generate has no parameter 'trace_headers': give it to add_request"):
        engine(None).generate(PROMPT, trace_headers={"traceparent": TRACEPARENT})


def test_a_tracer_that_raises_ends_nobodys_request(caplog):
    class Broken(sdk.SpanProcessor):
        def on_end(self, span):
            raise RuntimeError("no disk")

    provider = sdk.TracerProvider()
    provider.add_span_processor(Broken())
    outputs = engine(provider).generate([PROMPT] * 2, stars.SamplingParams(max_tokens=5), POLICIES[0], use_tqdm=False)
    assert all(one.finish_reason in ("stop", "length") for output in outputs for one in output.outputs)
    assert caplog.text.count("is lost: RuntimeError: no disk") == 2


def test_what_is_no_provider_is_refused():
    with pytest.raises(stars.RequestError, match="^tracer_provider is str, it must be an OpenTelemetry Tracer"):
        engine("http://localhost:4317")


@pytest.mark.parametrize("given, name", [
    ("org/name@v2", "org/name@v2"), (Path(__file__).parent, "tests"), (str(Path(__file__)), "test_spans.py")])
def test_a_model_is_called_as_it_was_given(given, name):
    assert stars.engine._name(given) == name


def test_without_opentelemetry_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(spans, "trace", None)
    with pytest.raises(stars.RequestError, match=r"^tracer_provider needs OpenTelemetry: pip install "
                                                 r"'stars-engine\[otel\]'$"):
        engine(object())
    assert engine(None).generate(PROMPT, stars.SamplingParams(max_tokens=2), use_tqdm=False)
