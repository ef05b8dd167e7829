"""Reads a trace file back, record by record, and refuses what is damaged, with the line at fault."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import IO, Any

from stars.errors import TraceError
from stars.trace.json_lines import loads, too_deep
from stars.trace.records import FORMAT, VERSION, TraceAttempt, TraceCompletion, TraceRequest, TraceSegment


def read_trace(file: str | os.PathLike[str] | IO[str] | IO[bytes]) -> list[TraceRequest]:
    """The requests of a trace file, given as a path or an open file.

    Raises TraceError, which names the line, for a file that is not a trace, of another version, damaged or cut short;
    OSError where there is no such file.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return TraceReader(opened, os.fspath(file)).read()
    return TraceReader(file, str(getattr(file, "name", "the trace"))).read()


class _Record:
    """One record with its place, whose fields are checked as they are taken."""

    def __init__(self, fields: dict[str, Any], where: str):
        self.fields = fields
        self.where = where

    @property
    def kind(self) -> Any:
        """What the record says it is."""
        return self.fields.get("type")

    def take(self, name: str, *kinds: type, optional: bool = False) -> Any:
        """The field `name`, of one of `kinds`; TraceError otherwise."""
        value = self.fields.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            raise TraceError(f"{self.where}: the {self.kind} record has {name} = {_short(value)}, which does not "
                             "belong there: write the trace again")
        return value

    def number(self, name: str) -> float:
        """A number, infinities written as strings; TraceError otherwise."""
        value = self.take(name, int, float, str)
        try:
            if not isinstance(value, str) or value in ("inf", "-inf", "nan"):
                return float(value)
        except OverflowError:
            pass
        raise TraceError(f"{self.where}: the {self.kind} record has {name} = {_short(value)}, which is no number: "
                         "write the trace again")

    def number_if_any(self, name: str) -> float | None:
        """The same, or None where there is none."""
        return None if self.fields.get(name) is None else self.number(name)

    def token_ids(self, name: str) -> list[int]:
        """A list of token ids; TraceError otherwise."""
        value: list[int] = self.take(name, list)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
            raise TraceError(f"{self.where}: {name} of the {self.kind} record holds something other than token ids: "
                             "write the trace again")
        return value

    def metrics(self) -> dict[str, Any]:
        """The record's counts and times; TraceError for anything that is no number."""
        value: dict[str, Any] = self.take("metrics", dict)
        for name, item in value.items():
            if item is not None and (isinstance(item, bool) or not isinstance(item, (int, float)) or abs(item) > 1e300):
                raise TraceError(f"{self.where}: metrics.{name} is {_short(item)}, which is no number: "
                                 "write the trace again")
        return value


class TraceReader:
    """The requests of one open file; `name` is what errors call it."""

    def __init__(self, file: IO[str] | IO[bytes], name: str):
        self.name = name
        self.line = 0
        self.records = self._parse(file)

    def read(self) -> list[TraceRequest]:
        """All requests; TraceError."""
        header = self._next("the file is empty")
        if header.kind != "trace" or header.fields.get("format") != FORMAT:
            raise TraceError(f"{header.where}: this is not a trace, whose first record says \"format\": \"{FORMAT}\": "
                             "give a file written by write_trace or --trace")
        if header.fields.get("version") != VERSION:
            raise TraceError(f"{header.where}: the trace is of version {_short(header.fields.get('version'))} and this "
                             f"program reads version {VERSION}: use the program that wrote it")
        return [self._request(record) for record in self.records]

    def _request(self, record: _Record) -> TraceRequest:
        self._expect(record, "request")
        policy = record.take("policy", dict)
        if not isinstance(policy.get("name"), str):
            raise TraceError(f"{record.where}: the request's policy has no name: write the trace again")
        policy = {name: float(value) if name != "name" and value in ("inf", "-inf") else value
                  for name, value in policy.items()}
        request_id = record.take("request_id", str)
        completions = [self._completion(request_id) for _ in range(record.take("completions", int))]
        return TraceRequest(
            request_id, record.take("prompt", str, list, optional=True), record.token_ids("prompt_token_ids"),
            record.take("params", dict, optional=True), policy, record.take("seed", int),
            record.number_if_any("prompt_reward"), record.metrics(), completions)

    def _completion(self, request_id: str) -> TraceCompletion:
        record = self._member("completion", request_id)
        index = record.take("completion", int)
        segments: list[TraceSegment] = []
        for _ in range(record.take("attempts", int)):
            self._attempt(self._member("attempt", request_id, index), segments)
        if segments:
            self._check_committed(segments[-1])
        return TraceCompletion(
            index, record.take("text", str, optional=True), record.token_ids("token_ids"),
            record.take("finish_reason", str, optional=True), record.take("stop_reason", int, str, optional=True),
            record.take("error", str, optional=True), record.number_if_any("reward"),
            record.number("cumulative_logprob"), record.metrics(), segments)

    def _attempt(self, record: _Record, segments: list[TraceSegment]) -> None:
        attempt = TraceAttempt(
            record.take("segment", int), record.take("attempt", int), record.take("text", str, optional=True),
            record.token_ids("token_ids"), record.number("logprob"), record.number_if_any("reward"),
            record.number_if_any("threshold"), record.number_if_any("accept_probability"),
            record.number_if_any("margin"), record.take("accepted", bool), record.take("committed", bool))
        if segments and (attempt.segment, attempt.attempt) == (len(segments) - 1, len(segments[-1].attempts) + 1):
            segments[-1].attempts.append(attempt)
        elif (attempt.segment, attempt.attempt) == (len(segments), 1):
            if segments:
                self._check_committed(segments[-1])
            segments.append(TraceSegment([attempt]))
        else:
            raise TraceError(f"{record.where}: attempt {attempt.attempt} of segment {attempt.segment} is out of order: "
                             "write the trace again")

    def _check_committed(self, segment: TraceSegment) -> None:
        count = sum(attempt.committed for attempt in segment.attempts)
        if count != 1:
            raise TraceError(f"{self._where}: segment {segment.attempts[0].segment}, which ends here or above, has "
                             f"{count} committed attempts where there is one: write the trace again")

    def _member(self, kind: str, request_id: str, completion: int | None = None) -> _Record:
        record = self._next(f"the file ends where a {kind} record of request {request_id} should follow: it was cut "
                            "short, write it again")
        self._expect(record, kind)
        if record.fields.get("request_id") != request_id or completion not in (None, record.fields.get("completion")):
            raise TraceError(f"{record.where}: this {kind} record does not belong to request {request_id} above it: "
                             "write the trace again")
        return record

    def _expect(self, record: _Record, kind: str) -> None:
        if record.kind != kind:
            raise TraceError(f"{record.where}: there is a record of type {_short(record.kind)} where one of type "
                             f"\"{kind}\" should be: write the trace again")

    def _next(self, otherwise: str) -> _Record:
        record = next(self.records, None)
        if record is None:
            raise TraceError(f"{self._where}: {otherwise}")
        return record

    @property
    def _where(self) -> str:
        return f"{self.name}, line {max(self.line, 1)}"

    def _parse(self, file: IO[str] | IO[bytes]) -> Iterator[_Record]:
        for line in file:
            self.line += 1
            try:
                fields = loads(line)
            except ValueError as error:
                raise TraceError(f"{self._where}: this line is not JSON ({error}): the file is no trace, or it was "
                                 "damaged or cut short") from error
            if not isinstance(fields, dict) or too_deep(fields):
                raise TraceError(f"{self._where}: this line holds no JSON object that a trace has: the file is no "
                                 "trace, or it was damaged")
            yield _Record(fields, self._where)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
