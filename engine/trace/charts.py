"""The charts of the trace page, as inline SVG; numbers only, no text of the trace enters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from stars.trace.records import TraceSegment
from stars.trace.show import number

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 30  # margins for the axes' labels


def rewards_chart(segments: Sequence[TraceSegment]) -> str:
    """Reward of every attempt and of what was committed, and the threshold, over segments."""
    values = [value for segment in segments for attempt in segment.attempts
              for value in (attempt.reward, attempt.threshold) if value is not None and math.isfinite(value)]
    low, high = _padded(values)

    def x(index: int) -> float:
        if len(segments) == 1:
            return (LEFT + WIDTH - RIGHT) / 2
        return LEFT + 14 + index * (WIDTH - LEFT - RIGHT - 28) / (len(segments) - 1)

    def y(value: float) -> float:
        return TOP + (high - min(max(value, low), high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_axis(low, high, y)]
    every = max(1, math.ceil(len(segments) / 16))
    parts += [f'<text x="{x(index):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{index + 1}</text>'
              for index in range(0, len(segments), every)]
    committed = [(index, segment.committed) for index, segment in enumerate(segments)]
    thresholds = [(x(index), y(attempt.threshold)) for index, attempt in committed
                  if attempt.threshold is not None and math.isfinite(attempt.threshold)]
    if len(thresholds) == 1:  # a line needs two ends
        thresholds = [(thresholds[0][0] - 20, thresholds[0][1]), (thresholds[0][0] + 20, thresholds[0][1])]
    parts.append(_line("threshold", thresholds))
    scored = [(index, attempt, attempt.reward) for index, attempt in committed if attempt.reward is not None]
    parts.append(_line("reward", [(x(index), y(reward)) for index, _, reward in scored]))
    for index, segment in enumerate(segments):
        parts += [f'<circle class="loser" cx="{x(index):.1f}" cy="{y(attempt.reward):.1f}" r="3"/>'
                  for attempt in segment.attempts if not attempt.committed and attempt.reward is not None]
    for index, attempt, reward in scored:
        kind = segments[index].status(attempt)
        words = f"segment {index + 1}: reward {number(reward)}"
        if attempt.threshold is not None:
            words += f", threshold {number(attempt.threshold)}"
        parts.append(f'<circle class="point {kind}" data-segment="{index}" cx="{x(index):.1f}" '
                     f'cy="{y(reward):.1f}" r="6"><title>{words}</title></circle>')
    words = "; ".join(f"{index + 1}: {number(reward)}" for index, _, reward in scored)
    return _svg(WIDTH, HEIGHT, f"rewards of the committed segments, {words}", parts)


def attempts_histogram(segments: Sequence[TraceSegment]) -> str:
    """How many segments needed how many attempts."""
    counts = Counter(segment.counted for segment in segments)
    max_attempts, most = max(counts, default=1), max(counts.values(), default=1)
    width, height, left, bottom, top = 360, 150, 8, 34, 18
    slots = max(max_attempts, 5)
    slot = (width - 2 * left) / slots
    parts = [f'<line class="grid" x1="{left}" x2="{width - left}" y1="{height - bottom}" y2="{height - bottom}"/>']
    for attempts in range(1, slots + 1):
        middle = left + (attempts - 0.5) * slot
        count = counts.get(attempts, 0)
        tall = count / most * (height - bottom - top)
        if count:
            parts.append(f'<rect class="bar" x="{middle - slot * 0.35:.1f}" y="{height - bottom - tall:.1f}" '
                         f'width="{slot * 0.7:.1f}" height="{tall:.1f}" rx="2"/>')
            parts.append(f'<text x="{middle:.1f}" y="{height - bottom - tall - 5:.1f}" text-anchor="middle">{count}'
                         "</text>")
        if slots <= 20 or attempts % 5 == 0 or attempts == 1:
            parts.append(f'<text x="{middle:.1f}" y="{height - 19}" text-anchor="middle">{attempts}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 3}" text-anchor="middle">attempts</text>')
    words = ", ".join(f"{count} segments with {attempts} attempts" for attempts, count in sorted(counts.items()))
    return _svg(width, height, words, parts)


def _axis(low: float, high: float, y: Callable[[float], float]) -> str:
    step = _step((high - low) / 6)
    parts = []
    for tick in range(math.ceil(low / step), math.floor(high / step) + 1):
        value = tick * step
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
                     f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    return "".join(parts)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.06 * (high - low) or max(1e-6, abs(high) * 0.1, 0.5)
    return low - pad, high + pad


def _step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= least * (1 - 1e-9))


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return ""
    return f'<polyline class="{kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'


def _svg(width: int, height: int, words: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}">{"".join(parts)}</svg>'
