"""The `stars` fields of answers: what the reward said, and on demand every segment with all its candidates."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, cast

from stars.outputs import Attempt, CompletionOutput, RequestOutput, Segment
from stars.plan import Policy
from stars.policies import POLICIES
from stars.sampling import SamplingParams
from stars.serve.http.growing_text import GrowingText
from stars.trace.json_lines import plain
from stars.trace.writer import trace_header, trace_lines

NAMES = {kind: name for name, kind in POLICIES.items()}


def number(value: float | None) -> float | None:
    """`value`, or null where JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


def policy_record(policy: Policy) -> dict[str, Any]:
    """A policy by its name, with its parameters."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(cast(Any, policy))}
    return {"name": NAMES[type(policy)]} | {
        name: number(value) if isinstance(value, float) else
        repr(value) if dataclasses.is_dataclass(value) else plain(value) for name, value in values.items()}


def choice_record(completion: CompletionOutput) -> dict[str, Any]:
    """What is said of a choice."""
    metrics = completion.metrics
    return {"reward": number(completion.reward), "accept_rate": number(metrics.accept_rate),
            "attempts": metrics.attempts, "width": metrics.width, "finish_reason": completion.finish_reason}


def trace_text(outputs: Sequence[RequestOutput], tokenizer: Any, params: Sequence[SamplingParams]) -> str:
    """A trace file of requests, as text. outputs: cumulative ones."""
    return trace_header() + "".join(
        trace_lines(output, tokenizer, of_it) for output, of_it in zip(outputs, params, strict=True))


def together(deltas: Sequence[RequestOutput]) -> RequestOutput:
    """The cumulative output that deltas of one request make."""
    last = deltas[-1]
    completions = []
    for index, completion in enumerate(last.outputs):
        parts = [delta.outputs[index] for delta in deltas]
        completions.append(dataclasses.replace(
            completion, text="".join(part.text or "" for part in parts),
            token_ids=[token for part in parts for token in part.token_ids],
            segments=[segment for part in parts for segment in part.segments]))
    return dataclasses.replace(last, outputs=completions)


class SegmentRecords:
    """The segments of one response, as they come."""

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], params: SamplingParams, token_ids: bool):
        self._grown = None if tokenizer is None else GrowingText(tokenizer, prompt_token_ids,
                                                                 params.skip_special_tokens)
        self._token_ids = token_ids  # whether they are shown
        self._segments: list[str] = []  # their texts
        self._shown: list[str] = []  # the text of the response

    def new(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """The records of what is new in a response."""
        self._shown.append(completion.text or "")
        return [self._record(segment, completion.finish_reason is not None and index == len(completion.segments) - 1)
                for index, segment in enumerate(completion.segments)]

    def _record(self, segment: Segment, ends: bool) -> dict[str, Any]:
        """ends: whether nothing comes after it, so that its text is what is left of the response's."""
        attempts = [self._attempt(attempt, ends) for attempt in segment.attempts]
        text = self._text(segment.token_ids, ends)
        if ends and text is not None:
            before, whole = "".join(self._segments), "".join(self._shown)
            text = whole[len(os.path.commonprefix((before, whole))):]
            if attempts:
                attempts[segment.winner]["text"] = text
        self._segments.append(text or "")
        if self._grown is not None and not ends:
            self._grown.add(segment.token_ids)
        record = {"text": text, "reward": number(segment.reward), "threshold": number(segment.threshold),
                  "accepted": segment.accepted, "winner": segment.winner, "attempts": attempts}
        return {**record, "token_ids": segment.token_ids} if self._token_ids else record

    def _attempt(self, attempt: Attempt, ends: bool) -> dict[str, Any]:
        record = {"text": self._text(attempt.token_ids, ends), "reward": number(attempt.reward),
                  "threshold": number(attempt.threshold), "accept_probability": number(attempt.accept_probability),
                  "accepted": attempt.accepted, "logprob": number(attempt.logprob)}
        return {**record, "token_ids": attempt.token_ids} if self._token_ids else record

    def _text(self, token_ids: list[int], ends: bool) -> str | None:
        return None if self._grown is None else self._grown.added(token_ids, ends)
