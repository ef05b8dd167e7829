"""Charts as SVG files of their own, readable on a dark page and on a light one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 330  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 56, 46
HEAD, LINE = 30, 18  # the title's height, and that of a line of notes
LIGHT = ("#1f5f99", "#c2571a", "#2e7d4f", "#8a3f94", "#b3261e")
DARK = ("#7db8ee", "#f0a06a", "#7fcf9c", "#d59be0", "#ff8a80")
STYLE = "".join([
    "svg{background:#fff;font:12px sans-serif}text{fill:#222}.title{font-weight:bold}.title.main{font-size:14px}"
    ".note{fill:#555}.grid{stroke:#ddd}.frame{stroke:#777;fill:none}.line{fill:none;stroke-width:2}"
    ".dashed{fill:none;stroke-width:1.5;stroke-dasharray:5 4}.back{fill:#fff}",
    *(f".s{index}{{stroke:{color}}}.f{index}{{fill:{color}}}" for index, color in enumerate(LIGHT)),
    "@media(prefers-color-scheme:dark){svg{background:#16181c}text{fill:#e6e6e6}.note{fill:#aaa}.grid{stroke:#33373d}"
    ".frame{stroke:#8a8f98}.back{fill:#16181c}",
    *(f".s{index}{{stroke:{color}}}.f{index}{{fill:{color}}}" for index, color in enumerate(DARK)), "}"])


class Axis(NamedTuple):
    """A range of values, and what is written at some of them."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one; what is outside lies at the end."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


class Series(NamedTuple):
    """Points of one kind."""

    name: str  # in the legend; "": it has no entry
    points: Sequence[tuple[float, float]]
    color: int
    kind: str = "line"  # or dots, dashed, crosses


class Panel(NamedTuple):
    """One chart."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]


def even_axis(label: str, low: float, high: float, about: int = 6) -> Axis:
    """An axis from `low` to `high` or a little beyond, marked at round values."""
    step = _round_step(max(high - low, 1e-9) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [(index * step, f"{index * step:.6g}") for index in range(first, max(last, first + 1) + 1)]
    return Axis(label, ticks[0][0], ticks[-1][0], ticks)


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis that holds all positive `values`, marked at 1, 2 and 5 of each power of ten."""
    positive = [value for value in values if value > 0.0] or [1.0]
    marks = [factor * 10.0**power for power in range(math.floor(math.log10(min(positive))) - 1,
                                                     math.floor(math.log10(max(positive))) + 2)
             for factor in (1, 2, 5)]
    low = max(mark for mark in marks if mark <= min(positive) * (1 + 1e-9))
    high = min(mark for mark in marks if mark >= max(positive) * (1 - 1e-9) and mark > low)
    inside = [mark for mark in marks if low <= mark <= high]
    while len(inside) > 10:  # the decades alone, then fewer of them
        inside = [mark for mark in inside if math.log10(mark) % 1 < 1e-9] if len(inside) > 20 else inside[::2]
    return Axis(label, low, high, [(mark, f"{mark:g}") for mark in inside], log=True)


def svg(title: str, panels: Sequence[Panel], notes: Sequence[str] = ()) -> str:
    """The text of a file with panels beside each other."""
    width, height = WIDTH * len(panels), HEAD + HEIGHT + LINE * len(notes) + 6
    words = "; ".join([title, *(panel.title for panel in panels), *notes])
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
             f'aria-label="{escape(words)}">', f"<style>{STYLE}</style>",
             f'<rect class="back" width="{width}" height="{height}"/>',
             f'<text class="title main" x="{LEFT}" y="20">{escape(title)}</text>']
    for index, panel in enumerate(panels):
        parts += [f'<g transform="translate({index * WIDTH} {HEAD})">', *_panel(panel), "</g>"]
    parts += [f'<text class="note" x="{LEFT}" y="{HEAD + HEIGHT + LINE * index + 12}">{escape(note)}</text>'
              for index, note in enumerate(notes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    def x(value: float) -> float:
        return LEFT + panel.x.share(value) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - panel.y.share(value) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(panel.title)}</text>']
    parts += [f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/><text x="{LEFT - 6}" '
              f'y="{y(value) + 4:.1f}" text-anchor="end">{escape(text)}</text>' for value, text in panel.y.ticks]
    parts += [f'<path class="grid" d="M{x(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/><text x="{x(value):.1f}" '
              f'y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
              for value, text in panel.x.ticks]
    parts += [f'<path class="frame" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>',
              f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">'
              f"{escape(panel.x.label)}</text>",
              f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
              f"{escape(panel.y.label)}</text>"]
    for series in panel.series:
        parts += _drawn(series, [(x(one), y(other)) for one, other in series.points])
    return parts + _legend(panel.series)


def _drawn(series: Series, points: Sequence[tuple[float, float]]) -> list[str]:
    color = series.color
    if series.kind in ("line", "dashed"):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        ends = [f'<circle class="f{color}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
        return [f'<polyline class="{series.kind} s{color}" points="{path}"/>',
                *(ends if series.kind == "line" and len(points) <= 20 else [])]
    if series.kind == "crosses":
        return [f'<path class="s{color}" d="M{a - 3:.1f} {b - 3:.1f}l6 6m0 -6l-6 6"/>' for a, b in points]
    return [f'<circle class="f{color}" cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill-opacity="0.7"/>' for a, b in points]


def _legend(series: Sequence[Series]) -> list[str]:
    parts, at = [], float(LEFT)
    for one in series:
        if one.name:
            parts.append(f'<rect class="f{one.color}" x="{at:.0f}" y="27" width="10" height="10" rx="2"/>'
                         f'<text x="{at + 14:.0f}" y="36">{escape(one.name)}</text>')
            at += 26 + 6.6 * len(one.name)
    return parts


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= least * (1 - 1e-9))
