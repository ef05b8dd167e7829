"""The plot of one run: latencies over time and by percentile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stars.bench.answers import COMPLETED, FAILED, REFUSED, Answer
from stars.bench.plot import Axis, Panel, Series, even_axis, log_axis, svg

LEAST = 0.1  # milliseconds: what is less is drawn there, for the axis is logarithmic
NAMES = ("time to first segment", "between segments", "per token", "end to end")
SHORT = ("first segment", "between segments", "per token", "whole answer")


def run_plot(title: str, answers: Sequence[Answer], duration: float, notes: Sequence[str]) -> str:
    """The text of an SVG file."""
    completed = [answer for answer in answers if answer.outcome == COMPLETED]
    kinds = [_milliseconds(values) for values in (
        [answer.ttft for answer in completed], [gap for answer in completed for gap in answer.gaps],
        [answer.tpot for answer in completed], [answer.e2el for answer in completed])]
    height = log_axis("milliseconds", [value for values in kinds for value in values] or [1.0])
    over_time = [Series(SHORT[index], [(answer.sent or 0.0, max(LEAST, 1e3 * seconds)) for answer in completed
                                       if (seconds := getattr(answer, name)) is not None], index, "dots")
                 for index, name in ((0, "ttft"), (3, "e2el"))]
    for outcome, color in ((REFUSED, 1), (FAILED, 4)):
        marks = [(answer.sent or answer.due, height.low) for answer in answers if answer.outcome == outcome]
        if marks:
            over_time.append(Series(outcome, marks, color, "crosses"))
    by_share = [Series(SHORT[index], _by_percentile(values), index) for index, values in enumerate(kinds) if values]
    return svg(title, [Panel("each request", even_axis("sent at, seconds", 0.0, duration), height, over_time),
                       Panel("by percentile", _percentile_axis(), height, by_share)], notes)


def _milliseconds(seconds: Sequence[float | None]) -> list[float]:
    return sorted(max(LEAST, 1e3 * one) for one in seconds if one is not None)


def _by_percentile(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points of the quantile function, closer together towards the tail."""
    tail = 1 - 10.0 ** -np.linspace(0.0, 3.0, 121)
    return [(-math.log10(1 - share), float(np.percentile(values, 100 * share))) for share in tail]


def _percentile_axis() -> Axis:
    """The tail's decades are equally wide."""
    shares = (0, 50, 90, 99, 99.9)
    return Axis("percentile", 0.0, 3.0, [(-math.log10(1 - share / 100), f"{share:g}") for share in shares])
