"""A trace in the terminal: what was kept, what was thrown away, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stars.cli.terminal import Style, one_line, wrapped
from stars.trace.records import TraceAttempt, TraceCompletion, TraceRequest, TraceSegment

SHOWN_REJECTED = 3  # of a segment, unless all attempts are asked for
BAR = 16  # characters
STATUS = {"accepted": ("+", "good"), "fallback": ("~", "warn"), "rejected": ("x", "bad"), "skipped": (".", "dim"),
          "kept": ("+", "good"), "lower": ("x", "bad")}
"""By status: the mark that tells it without colour, and the colour."""
LEGEND = "+ accepted  x rejected  ~ best of the rejected, kept after the last attempt  . drawn but not needed"
BAR_LEGEND = "bars: █ the reward, ┃ the threshold, on one scale for the whole request"


class Scale:
    """Rewards and thresholds of a request on a bar of BAR characters."""

    def __init__(self, values: Sequence[float]):
        finite = [value for value in values if math.isfinite(value)]
        self.low = min(finite, default=0.0)
        self.high = max(finite, default=1.0)

    def bar(self, reward: float | None, threshold: float | None) -> str:
        """The reward as a filled length, the threshold as a mark."""
        if reward is None:
            return " " * BAR
        filled = self._place(reward) + 1 if reward != -math.inf else 0
        cells = ["█"] * filled + ["·"] * (BAR - filled)
        if threshold is not None:
            cells[self._place(threshold)] = "┃"
        return "".join(cells)

    def _place(self, value: float) -> int:
        if self.high <= self.low:
            return BAR // 2
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return min(BAR - 1, int(share * BAR))


def request_lines(request: TraceRequest, style: Style, width: int, all_attempts: bool = False) -> list[str]:
    """The whole request."""
    lines = [style("title", one_line(f"request {request.request_id}  {describe_policy(request.policy)}", width))]
    facts = [f"seed {request.seed}"] + [f"{name} {value}" for name, value in (request.params or {}).items()
                                       if name != "seed"]
    if request.prompt_reward is not None:
        facts.append(f"r(prompt) {number(request.prompt_reward)}")
    lines += wrapped("  ".join(facts), width, "  ")
    lines += wrapped(prompt_text(request), width, "  > ")
    scale = scale_of(request)
    for completion in request.completions:
        if len(request.completions) > 1:
            lines += ["", style("bold", f"completion {completion.index}")]
        for segment in completion.segments:
            lines += segment_lines(segment, scale, style, width, all_attempts)
        lines += completion_lines(completion, style, width)
    return lines


def legend_lines(requests: Sequence[TraceRequest], style: Style, width: int) -> list[str]:
    """What the marks and bars mean, to be printed once."""
    thresholds = any(attempt.threshold is not None for request in requests for completion in request.completions
                     for segment in completion.segments for attempt in segment.attempts)
    marks = LEGEND if thresholds else "+ kept   x lower reward"
    return [style("dim", line) for line in wrapped(marks, width) + wrapped(BAR_LEGEND, width)]


def segment_lines(segment: TraceSegment, scale: Scale, style: Style, width: int,
                  all_attempts: bool = False) -> list[str]:
    """One segment: its losers, each in a line (with all attempts: in full), then what was committed."""
    committed = segment.committed
    before = [a for a in segment.attempts if segment.status(a) in ("rejected", "lower")]
    skipped = [a for a in segment.attempts if segment.status(a) == "skipped"]
    lines: list[str] = []
    hidden = 0 if all_attempts else max(0, len(before) - SHOWN_REJECTED)
    if hidden:
        lines.append(style("dim", f"       … {hidden} more rejected"))
    for attempt in before[hidden:]:
        lines += _loser_lines(attempt, segment, scale, style, width, all_attempts)
    lines += _winner_lines(committed, segment, scale, style, width)
    if all_attempts:
        for attempt in skipped:
            lines += _loser_lines(attempt, segment, scale, style, width, True)
    return lines


def completion_lines(completion: TraceCompletion, style: Style, width: int) -> list[str]:
    """How it ended, and its figures in one line."""
    metrics = completion.metrics
    parts = [f"ended by {completion.finish_reason or 'nothing yet'}", f"{len(completion.token_ids)} tokens"]
    if completion.reward is not None:
        parts.append(f"reward {number(completion.reward)}")
    if any(attempt.threshold is not None for segment in completion.segments for attempt in segment.attempts):
        rate = metrics.get("accept_rate")
        parts.append(f"{_count(metrics, 'segments')} segments from {_count(metrics, 'attempts_counted')} attempts"
                     + (f" (accept rate {rate:.2f})" if rate is not None else ""))
        if metrics.get("fallbacks"):
            parts.append(f"{metrics['fallbacks']} by fallback")
    parts.append(f"LM {metrics.get('lm_seconds') or 0:.2f} s, RM {metrics.get('rm_seconds') or 0:.2f} s")
    lines = [style("bold", line) for line in wrapped("= " + ", ".join(parts), width)]
    if completion.error is not None:
        lines += [style("bad", line) for line in wrapped("error: " + completion.error, width, "  ")]
    return lines


def scale_of(request: TraceRequest) -> Scale:
    """One scale for everything a request shows."""
    attempts = [attempt for completion in request.completions for segment in completion.segments
                for attempt in segment.attempts]
    return Scale([value for attempt in attempts for value in (attempt.reward, attempt.threshold) if value is not None])


def describe_policy(policy: dict[str, Any]) -> str:
    """STARS(segment_size=16, …), without what was left to the engine."""
    inside = ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                       for name, value in policy.items() if name != "name" and value is not None)
    return f"{policy['name']}({inside})"


def prompt_text(request: TraceRequest) -> str:
    """The prompt as it was given, in readable form."""
    if isinstance(request.prompt, str):
        return request.prompt
    if request.prompt is None:
        return f"{len(request.prompt_token_ids)} token ids"
    return "\n".join(f"{message.get('role')}: {message.get('content')}" if isinstance(message, dict) else str(message)
                     for message in request.prompt)


def number(value: float | None) -> str:
    """A reward with its sign, in two decimals."""
    if value is None:
        return "–"
    return f"{value:+.2f}" if math.isfinite(value) else f"{value:+}"


def _winner_lines(attempt: TraceAttempt, segment: TraceSegment, scale: Scale, style: Style, width: int) -> list[str]:
    mark, kind = STATUS[segment.status(attempt)]
    head = f"{mark} {attempt.segment + 1:>3}"
    facts = _facts(attempt, scale, style, kind)
    if attempt.threshold is not None:
        facts += f"  attempt {attempt.attempt}" + (f" of {len(segment.attempts)}" if len(segment.attempts) > 1 else "")
    lines = [f"{style(kind, head)} {facts}"] if facts.strip() else [style(kind, head)]
    return lines + wrapped(_text(attempt), width, "      ")


def _loser_lines(attempt: TraceAttempt, segment: TraceSegment, scale: Scale, style: Style, width: int,
                 full: bool) -> list[str]:
    mark, kind = STATUS[segment.status(attempt)]
    head = style(kind, mark) + " " * 5
    facts = _facts(attempt, scale, style, kind)
    if full:
        lines = [f"{head}{facts or 'not scored'}  logprob {attempt.logprob:.1f}"]
        text = wrapped(_text(attempt), width - 6)
        return lines + [f"    {style(kind, mark)} {style('struck', line)}" for line in text]
    room = width - 6 - _visible_length(attempt) - 2
    return [f"{head}{facts}  {style('struck', one_line(_text(attempt).strip(), max(10, room)))}"]


def _facts(attempt: TraceAttempt, scale: Scale, style: Style, kind: str) -> str:
    """Reward against threshold, as numbers and as a bar."""
    if attempt.reward is None:
        return ""
    if attempt.threshold is None:
        return f"{number(attempt.reward):>6} {style(kind, scale.bar(attempt.reward, None))}"
    sign = "≥" if attempt.reward >= attempt.threshold else "<"
    return (f"{number(attempt.reward):>6} {sign} {number(attempt.threshold):>5} "
            f"{style(kind, scale.bar(attempt.reward, attempt.threshold))} p {attempt.accept_probability or 0:.2f}")


def _visible_length(attempt: TraceAttempt) -> int:
    """Characters of `_facts` without its colours."""
    return len(_facts(attempt, Scale([]), Style(False), "dim"))


def _text(attempt: TraceAttempt) -> str:
    if attempt.text is None:
        return " ".join(map(str, attempt.token_ids))
    return attempt.text


def _count(metrics: dict[str, Any], name: str) -> Any:
    return metrics.get(name, "?")
