"""The trace of a run: every attempt with its reward and threshold, as strict JSON, one record a line.

A file begins with one record {"type": "trace", "format": "stars-trace", "version": 1}. Each request follows as one
"request" record, and for each of its completions one "completion" record with its "attempt" records behind it, in the
order they were drawn. Records say how many others follow, so that a file cut short is noticed. Numbers that JSON lacks
are the strings "-inf", "inf" and "nan".
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from stars.detokenizer import Detokenizer
from stars.line_file import LineFile

if TYPE_CHECKING:
    from stars.outputs import CompletionOutput, RequestOutput
    from stars.sampling import SamplingParams

FORMAT, VERSION = "stars-trace", 1
MAX_NESTING = 100  # of what is read: far beyond any use, and far from what exhausts the stack when it is written again
REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete UTF-8 sequence to


class TraceAttempt(NamedTuple):
    """One drawn candidate of a segment."""

    segment: int  # from 0
    attempt: int  # from 1
    text: str | None  # None where the model has no tokenizer
    token_ids: list[int]
    logprob: float  # under the LM with its penalties, nats
    reward: float | None  # None where it was not needed
    threshold: float | None
    accept_probability: float | None
    margin: float | None  # reward - threshold
    accepted: bool
    committed: bool  # it became part of the response: accepted, or the best seen after the last attempt


class TraceSegment(NamedTuple):
    """The attempts of one segment, in the order of the draw."""

    attempts: list[TraceAttempt]

    @property
    def committed(self) -> TraceAttempt:
        """The one that became part of the response."""
        return next(attempt for attempt in self.attempts if attempt.committed)

    @property
    def counted(self) -> int:
        """Attempts up to the accepted one, or all of them where none was."""
        return sum(self.status(attempt) != "skipped" for attempt in self.attempts)

    def status(self, attempt: TraceAttempt) -> str:
        """"accepted", "fallback" (best of the rejected), "rejected", "skipped" (behind the accepted one), "kept" or
        "lower" (where the method has no threshold: the candidate kept, and those that were not)."""
        committed = self.committed
        if committed.threshold is None:
            return "kept" if attempt.committed else "lower"
        if attempt.committed:
            return "accepted" if attempt.accepted else "fallback"
        return "skipped" if committed.accepted and attempt.attempt > committed.attempt else "rejected"


@dataclass(frozen=True)
class TraceCompletion:
    """One completion of a request."""

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None
    reward: float | None
    cumulative_logprob: float
    metrics: dict[str, Any]
    segments: list[TraceSegment]


@dataclass(frozen=True)
class TraceRequest:
    """One request: what was asked and what came of it."""

    request_id: str
    prompt: str | list[dict] | None  # as given: text, messages, or None where token ids were given
    prompt_token_ids: list[int]
    params: dict[str, Any] | None  # the sampling parameters that differ from their defaults, with max_tokens
    policy: dict[str, Any]  # "name" and its parameters
    seed: int
    prompt_reward: float | None
    metrics: dict[str, Any]
    completions: list[TraceCompletion]


# -- writing ------------------------------------------------------------------------------------------------------


def request_trace(output: RequestOutput, tokenizer: Any, sampling_params: SamplingParams | None = None) -> TraceRequest:
    """The trace of one request; `tokenizer` is the engine's, None leaves texts out."""
    policy = {"name": type(output.policy).__name__}
    if dataclasses.is_dataclass(output.policy):
        policy.update(dataclasses.asdict(output.policy))
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


def write_trace(file: str | os.PathLike | IO[str], outputs: RequestOutput | Sequence[RequestOutput], tokenizer: Any,
                sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> None:
    """Writes a trace of `outputs` to a path or an open text file.

    tokenizer: the engine's (`engine.tokenizer`). sampling_params: those of the requests, one for all or one for each,
    to be named in the trace. Raises OSError.
    """
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    params = list(sampling_params) if isinstance(sampling_params, (list, tuple)) else [sampling_params] * len(outputs)
    lines = [trace_header(), *(trace_lines(output, tokenizer, of_output)
                               for output, of_output in zip(outputs, params, strict=True))]
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
    from stars import __version__

    return dumps({"type": "trace", "format": FORMAT, "version": VERSION, "engine": __version__}) + "\n"


def trace_lines(output: RequestOutput, tokenizer: Any, sampling_params: SamplingParams | None = None) -> str:
    """The lines of one request: written in one piece, what stands in the file is always whole requests."""
    return "".join(dumps(record) + "\n" for record in trace_records(output, tokenizer, sampling_params))


def plain(value: Any) -> Any:
    """`value` in strict JSON's terms: numbers that JSON lacks as text, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def dumps(value: Any, ascii_only: bool = False) -> str:
    """One line of strict JSON, readable text where it can be written as UTF-8."""
    text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
    try:
        text.encode("utf8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(value, allow_nan=False)
    return text


def loads(line: bytes | str) -> Any:
    """The value of one line of strict JSON in UTF-8; ValueError says what is wrong with any other line."""
    text = line if isinstance(line, str) else line.decode("utf8")
    try:
        return json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # advice for programmers follows
            raise ValueError("it has a number of too many digits") from None
        raise


def too_deep(value: Any) -> bool:
    """Whether a value that was read nests lists and objects more than MAX_NESTING deep."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [item for outer in level if isinstance(outer, (dict, list))
                 for item in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond the range of numbers")
    return number


def metrics_record(metrics: Any) -> dict[str, Any]:
    """The counts and times with the accept rate that follows from them."""
    return {**vars(metrics), "accept_rate": metrics.accept_rate}


def _shown_params(params: SamplingParams | None) -> dict[str, Any] | None:
    if params is None:
        return None
    return {field.name: plain(getattr(params, field.name)) for field in dataclasses.fields(params)
            if field.name == "max_tokens" or getattr(params, field.name) not in (field.default, ())}


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
            elif ends and number == winner:  # a stop string and what stands behind it are no part of the text
                text = _behind(shown, completion.text)
            else:
                text = _behind(shown, _decode(tokenizer, before + attempt.token_ids, ends))
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
    text = tokenizer.decode(token_ids)
    return text if ends else text.rstrip(REPLACEMENT)


def _behind(before: str, text: str) -> str:
    """What `text` adds to `before`, its beginning."""
    return text[len(os.path.commonprefix([before, text])):]


# -- reading ------------------------------------------------------------------------------------------------------


def read_trace(file: str | os.PathLike | IO) -> list[TraceRequest]:
    """The requests of a trace file, given as a path or an open file.

    Raises TraceError, which names the line, for a file that is not a trace, of another version, damaged or cut short;
    OSError where there is no such file.
    """
    from stars.trace_reader import TraceReader

    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return TraceReader(opened, os.fspath(file)).read()
    return TraceReader(file, str(getattr(file, "name", "the trace"))).read()
