"""The `stars` fields of answers: what the reward said, and on demand every segment with all its candidates."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, cast

from stars.model.tokenizer import REPLACEMENT, Detokenizer
from stars.outputs import Attempt, CompletionOutput, RequestOutput, Segment
from stars.plan import Policy
from stars.policies import POLICIES
from stars.sampling import SamplingParams
from stars.trace.json_lines import plain
from stars.trace.writer import trace_header, trace_lines

NAMES = {kind: name for name, kind in POLICIES.items()}
TAIL = 64
"""Tokens in front of a segment that its texts are decoded after, of which `Detokenizer` takes as many as it needs."""


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
    """The segments of one response, as they come.

    Each is decoded after a few tokens before it, and not after all of the response: what a segment costs does not grow.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], params: SamplingParams, token_ids: bool):
        self._tokenizer = tokenizer
        self._skip = params.skip_special_tokens
        self._token_ids = token_ids  # whether they are shown
        self._tail = list(prompt_token_ids[-TAIL:])
        self._segments: list[str] = []  # their texts
        self._shown: list[str] = []  # the text of the response

    def new(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """The records of what is new in a response."""
        self._shown.append(completion.text or "")
        return [self._record(segment, completion.finish_reason is not None and index == len(completion.segments) - 1)
                for index, segment in enumerate(completion.segments)]

    def _record(self, segment: Segment, ends: bool) -> dict[str, Any]:
        """ends: whether nothing comes after it, so that its text is what is left of the response's."""
        decoder = None if self._tokenizer is None else Detokenizer(self._tokenizer, self._tail, self._skip)

        def text_of(token_ids: list[int]) -> str | None:
            text = None if decoder is None else decoder.decode(token_ids)
            return text if text is None or ends else text.rstrip(REPLACEMENT)

        text = text_of(segment.token_ids)
        if ends and text is not None:
            before, whole = "".join(self._segments), "".join(self._shown)
            text = whole[len(os.path.commonprefix((before, whole))):]
        attempts = [self._attempt(attempt, text_of) for attempt in segment.attempts]
        if ends and attempts and attempts[segment.winner]["text"] is not None:
            attempts[segment.winner]["text"] = text
        self._segments.append(text or "")
        self._tail = [*self._tail, *segment.token_ids][-TAIL:]
        record = {"text": text, "reward": number(segment.reward), "threshold": number(segment.threshold),
                  "accepted": segment.accepted, "winner": segment.winner, "attempts": attempts}
        return {**record, "token_ids": segment.token_ids} if self._token_ids else record

    def _attempt(self, attempt: Attempt, text_of: Any) -> dict[str, Any]:
        record = {"text": text_of(attempt.token_ids), "reward": number(attempt.reward),
                  "threshold": number(attempt.threshold), "accept_probability": number(attempt.accept_probability),
                  "accepted": attempt.accepted, "logprob": number(attempt.logprob)}
        return {**record, "token_ids": attempt.token_ids} if self._token_ids else record
