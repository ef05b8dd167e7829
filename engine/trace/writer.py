"""The trace of a run: every attempt with its reward and threshold, as strict JSON, one record a line.

A file begins with one record {"type": "trace", "format": "stars-trace", "version": 1}. Each request follows as one
"request" record, and for each of its completions one "completion" record followed by its "attempt" records, in the
order they were drawn. Records say how many others follow, so that a file cut short is noticed. Numbers that JSON lacks
are the strings "-inf", "inf" and "nan".
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from stars.line_file import LineFile
from stars.model.tokenizer import Detokenizer
from stars.trace.json_lines import dumps, plain
from stars.trace.records import FORMAT, VERSION, TraceAttempt, TraceCompletion, TraceRequest, TraceSegment
from stars.version import __version__

if TYPE_CHECKING:
    from stars.outputs import CompletionOutput, RequestOutput
    from stars.sampling import SamplingParams

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete UTF-8 sequence to


def request_trace(output: RequestOutput, tokenizer: Any, sampling_params: SamplingParams | None = None) -> TraceRequest:
    """The trace of one request, of a cumulative output; `tokenizer` is the engine's, None leaves texts out."""
    policy = {"name": type(output.policy).__name__}
    if dataclasses.is_dataclass(output.policy):
        policy.update(_shown_policy(output.policy))
    detokenizer = None if tokenizer is None else Detokenizer(tokenizer, output.prompt_token_ids)
    return TraceRequest(
        output.request_id, output.prompt, list(output.prompt_token_ids), _shown_params(sampling_params), policy,
        output.seed, output.prompt_reward, metrics_record(output.metrics),
        [TraceCompletion(
            completion.index, completion.text if tokenizer is not None else None, list(completion.token_ids),
            completion.finish_reason, completion.stop_reason, completion.error, completion.reward,
            completion.cumulative_logprob, metrics_record(completion.metrics), _segments(completion, detokenizer),
        ) for completion in output.outputs])


def trace_records(output: RequestOutput, tokenizer: Any,
                  sampling_params: SamplingParams | None = None) -> list[dict[str, Any]]:
    """The records of one request, ready for JSON; the file's own first record is not among them."""
    request = request_trace(output, tokenizer, sampling_params)
    of_request = {"request_id": request.request_id}
    records = [{"type": "request", **vars(request), "completions": len(request.completions)}]
    for completion in request.completions:
        attempts = [attempt for segment in completion.segments for attempt in segment.attempts]
        fields = {name: value for name, value in vars(completion).items() if name not in ("index", "segments")}
        of_completion = {**of_request, "completion": completion.index}
        records.append({"type": "completion", **of_completion, **fields, "attempts": len(attempts)})
        records += [{"type": "attempt", **of_completion, **attempt._asdict()} for attempt in attempts]
    return [plain(record) for record in records]


def write_trace(file: str | os.PathLike[str] | IO[str], outputs: RequestOutput | Sequence[RequestOutput],
                tokenizer: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> None:
    """Writes a trace of `outputs` to a path or an open text file.

    tokenizer: the engine's (`engine.tokenizer`). sampling_params: those of the requests, one for all or one for each,
    to be named in the trace. Raises OSError.
    """
    runs: list[RequestOutput] = list(outputs) if isinstance(outputs, Sequence) else [outputs]
    params: list[SamplingParams | None] = (
        list(sampling_params) if isinstance(sampling_params, Sequence) else [sampling_params] * len(runs))
    lines = [trace_header(), *(trace_lines(run, tokenizer, of_run)
                               for run, of_run in zip(runs, params, strict=True))]
    if not isinstance(file, (str, os.PathLike)):
        for part in lines:
            file.write(part)
        return
    with LineFile(file) as opened:  # an older trace is there until this one is complete
        opened.clear()
        for part in lines:
            opened.write(part)


def trace_header() -> str:
    """The first line of a trace file."""
    return dumps({"type": "trace", "format": FORMAT, "version": VERSION, "engine": __version__}) + "\n"


def trace_lines(output: RequestOutput, tokenizer: Any, sampling_params: SamplingParams | None = None) -> str:
    """The lines of one request: written in one piece, what stands in the file is always whole requests."""
    return "".join(dumps(record) + "\n" for record in trace_records(output, tokenizer, sampling_params))


def metrics_record(metrics: Any) -> dict[str, Any]:
    """The counts and times with the accept rate that follows from them."""
    return {**vars(metrics), "accept_rate": metrics.accept_rate}


def _shown_policy(policy: Any) -> dict[str, Any]:
    """Its fields; what is an object of its own, as an exhaustion may be, as Python shows it."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {name: repr(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _shown_params(params: SamplingParams | None) -> dict[str, Any] | None:
    if params is None:
        return None
    return {field.name: plain(_shown_value(getattr(params, field.name))) for field in dataclasses.fields(params)
            if field.name != "output_kind"  # how outputs were handed over changes nothing of them
            and (field.name == "max_tokens" or getattr(params, field.name) not in (field.default, ()))}


def _shown_value(value: Any) -> Any:
    """A parameter; what has parameters of its own, as those of structured outputs, by those that are given."""
    if not dataclasses.is_dataclass(value):
        return value
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)
            if getattr(value, field.name) is not None}


def _segments(completion: CompletionOutput, tokenizer: Any) -> list[TraceSegment]:
    segments = []
    before: list[int] = []
    for index, segment in enumerate(completion.segments):
        ends = completion.finish_reason is not None and index == len(completion.segments) - 1
        shown = _decode(tokenizer, before)
        winner = segment.winner
        attempts = []
        for number, attempt in enumerate(segment.attempts):
            if tokenizer is None:
                text = None
            elif ends and number == winner:
                text = _added(shown, _ended(tokenizer, before + segment.token_ids, completion))
            else:
                text = _added(shown, _decode(tokenizer, before + attempt.token_ids, ends))
            margin = None
            if attempt.reward is not None and attempt.threshold is not None:
                margin = attempt.reward - attempt.threshold
                margin = None if math.isnan(margin) else margin
            attempts.append(TraceAttempt(
                index, number + 1, text, list(attempt.token_ids), attempt.logprob, attempt.reward, attempt.threshold,
                attempt.accept_probability, margin, attempt.accepted, number == winner))
        segments.append(TraceSegment(attempts))
        before = before + segment.token_ids
    return segments


def _decode(tokenizer: Any, token_ids: list[int], ends: bool = False) -> str:
    """The text of a beginning of a response; an incomplete character at its end belongs to what follows."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(token_ids)
    return text if ends else text.rstrip(REPLACEMENT)


def _ended(tokenizer: Any, token_ids: list[int], completion: CompletionOutput) -> str:
    """The text of a whole response: a stop string and what follows it, or a stop token, are no part of it."""
    reason = completion.stop_reason
    by_token = completion.finish_reason == "stop" and not isinstance(reason, str)
    text = _decode(tokenizer, token_ids[:-1] if by_token else token_ids, True)
    return text[: text.index(reason)] if isinstance(reason, str) and reason in text else text


def _added(before: str, text: str) -> str:
    """What `text` adds to `before`, its beginning."""
    return text[len(os.path.commonprefix([before, text])):]
