"""One OpenTelemetry span a request, made when it has ended: what runs pays nothing. It has no prompt and no text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from stars.arguments import shown
from stars.errors import RequestError, describe, log
from stars.outputs import Metrics
from stars.request import Group, Request
from stars.version import __version__

try:
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # an extra
    trace = None  # type: ignore[assignment]

Value = str | int | float | list[str]
NANO = 10**9
SEGMENT = "stars.segment"
LATENCIES = {
    "first_segment": "gen_ai.latency.time_to_first_token",
    "finished": "gen_ai.latency.e2e",
    "queue": "gen_ai.latency.time_in_queue",
    "prefill": "gen_ai.latency.time_in_model_prefill",
    "decode": "gen_ai.latency.time_in_model_decode",
    "inference": "gen_ai.latency.time_in_model_inference",
}
"""Attributes of phases of `Times`, seconds; vLLM's names."""


class Spans:
    """The spans of one engine's requests, with the attributes of OpenTelemetry's conventions for generative models, the
    latencies of vLLM, and an event for each segment.

    tracer_provider: an OpenTelemetry TracerProvider. model: its name in the spans. RequestError without OpenTelemetry.
    """

    def __init__(self, tracer_provider: Any, model: str):
        if trace is None:
            raise RequestError("tracer_provider needs OpenTelemetry: pip install 'stars-engine[otel]'")
        if not isinstance(tracer_provider, trace.TracerProvider):
            raise RequestError(f"tracer_provider is {type(tracer_provider).__name__}, it must be an OpenTelemetry "
                               "TracerProvider")
        self._tracer = tracer_provider.get_tracer("stars", __version__)
        self._model = model

    def ended(self, request: Request) -> None:
        """Makes the span of a request that has ended. A tracer that raises ends nobody's request: it is logged."""
        try:
            self._export(request)
        except Exception as error:
            log(f"the span of request {request.request_id} is lost: {describe(error)}", error)

    def _export(self, request: Request) -> None:
        assert request.ended is not None
        zero = time.time_ns() - int(time.monotonic() * NANO)  # of the monotonic clock, in the world's

        def moment(seconds: float) -> int:
            return zero + int(seconds * NANO)

        operation = "chat" if isinstance(request.prompt.given, list) else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {self._model}", request.trace_context, trace.SpanKind.INTERNAL,
            {"gen_ai.operation.name": operation, "gen_ai.provider.name": "stars", "gen_ai.request.model": self._model,
             **dict(_asked(request)), **dict(_found(request))},
            start_time=moment(request.arrived))
        for group in request.groups:
            for at, attributes in _segments(group):
                span.add_event(SEGMENT, attributes, moment(at))
        error = next((one.error for one in request.hypotheses if one.finish_reason == "error"), None)
        if error is not None:
            span.set_attribute("error.type", "_OTHER")
            span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        span.end(moment(request.ended))


def parent_of(spans: Spans | None, trace_headers: Mapping[str, str] | None = None) -> Any:
    """The context that the span of a request belongs to which is made here and now: that of its W3C headers, or the
    caller's own; None where there are no spans. RequestError for headers that are none."""
    if trace_headers is not None and not (isinstance(trace_headers, Mapping) and all(
            isinstance(text, str) for pair in trace_headers.items() for text in pair)):
        raise RequestError(f"trace_headers is {shown(trace_headers)}, it must be a dictionary of texts, such as "
                           '{"traceparent": "00-..."}')
    if spans is None:
        return None
    if trace_headers is None:
        return context.get_current()
    return TraceContextTextMapPropagator().extract({name.lower(): text for name, text in trace_headers.items()})


def _asked(request: Request) -> Iterator[tuple[str, Value]]:
    """What was asked for."""
    params = request.params
    yield "gen_ai.request.max_tokens", request.max_tokens
    yield "gen_ai.request.temperature", params.temperature
    yield "gen_ai.request.top_p", params.top_p
    yield "gen_ai.request.top_k", params.top_k
    yield "gen_ai.request.frequency_penalty", params.frequency_penalty
    yield "gen_ai.request.presence_penalty", params.presence_penalty
    yield "gen_ai.request.seed", request.seed
    yield "gen_ai.request.choice.count", params.n
    if request.stop:
        yield "gen_ai.request.stop_sequences", list(request.stop)
    yield "stars.policy", type(request.policy).__name__
    if request.user is not None:
        yield "user.id", request.user


def _found(request: Request) -> Iterator[tuple[str, Value]]:
    """What became of it."""
    metrics = Metrics()
    for group in request.groups:
        metrics.add(group.metrics())
    yield "gen_ai.response.id", str(request.request_id)
    yield "gen_ai.response.finish_reasons", [str(group.finish_reason) for group in request.groups]
    yield "gen_ai.usage.input_tokens", len(request.prompt.token_ids)
    yield "gen_ai.usage.output_tokens", metrics.lm_tokens_kept
    for name, seconds in request.times.phases().items():
        yield LATENCIES[name], seconds
    yield "stars.segments", metrics.segments
    yield "stars.attempts", metrics.attempts
    if metrics.accept_rate is not None:
        yield "stars.accept_rate", metrics.accept_rate
    yield "stars.fallbacks", metrics.fallbacks
    yield "stars.lm_tokens_drawn", metrics.lm_tokens_drawn
    yield "stars.rm_tokens_scored", metrics.rm_tokens_scored
    yield "stars.lm_seconds", metrics.lm_seconds
    yield "stars.rm_seconds", metrics.rm_seconds
    yield "stars.num_preemptions", metrics.num_preemptions


def _segments(group: Group) -> Iterator[tuple[float, dict[str, Value]]]:
    """When each segment of a completion became history, and what is to be said of it."""
    for index, (at, segment) in enumerate(zip(group.times, group.shared(), strict=True)):
        attributes: dict[str, Value] = {
            "completion": group.index, "index": index, "tokens": len(segment.token_ids),
            "attempts": len(segment.attempts), "accepted": segment.accepted}
        if segment.reward is not None:
            attributes["reward"] = segment.reward
        yield at, attributes
