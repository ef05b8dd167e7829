"""Numbers as Prometheus reads them: its text format, version 0.0.4."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from stars.arguments import shown
from stars.errors import RequestError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What a server says of the text."""

LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Histogram(NamedTuple):
    """Values that were observed, counted by ranges."""

    bounds: tuple[float, ...]  # of the ranges, rising; each range includes its own
    counts: tuple[int, ...]  # one more than bounds: of what is above them all
    sum: float  # of the values

    @property
    def total(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class Family(NamedTuple):
    """All that is shown under one name."""

    name: str  # without the suffixes of a histogram's samples
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Mapping[Any, float | Histogram]  # by the value of `label`; one, by "", where there is none
    label: str | tuple[str, ...] | None = None  # several: `samples` are by tuples of as many values

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names."""
        return () if self.label is None else (self.label,) if isinstance(self.label, str) else self.label


def exposition(families: Sequence[Family], labels: Mapping[str, str]) -> str:
    """The text of all `families`, with `labels` on every sample. RequestError for a label that cannot be one."""
    taken = {"le", *(name for family in families for name in family.names)}
    for name, value in labels.items():
        if not LABEL.fullmatch(name) or name.startswith("__") or name in taken or not isinstance(value, str):
            raise RequestError(f"{shown(name)}={shown(value)} cannot be a label of metrics: give a text, and a name of "
                               "letters, digits and underscores that no metric has yet")
    return "".join(line + "\n" for family in families for line in _lines(family, list(labels.items())))


def merged(texts: Sequence[str]) -> str:
    """One text of several, whose samples differ by their labels: all of a name stand together, told of once."""
    blocks: dict[str, list[str]] = {}
    block: list[str] = []
    for line in (line for text in texts for line in text.splitlines()):
        if line.startswith("#"):
            block = blocks.setdefault(line.split(" ")[2], [])
        if not line.startswith("#") or line not in block:
            block.append(line)
    return "".join(line + "\n" for lines in blocks.values() for line in lines)


def _lines(family: Family, labels: list[tuple[str, str]]) -> Iterator[str]:
    yield f"# HELP {family.name} " + family.help.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# TYPE {family.name} {family.kind}"
    for value, sample in family.samples.items():
        values = value if isinstance(value, tuple) else (value,)
        own = [*labels, *zip(family.names, values, strict=family.label is not None)]
        if not isinstance(sample, Histogram):
            yield f"{family.name}{_labels(own)} {_number(sample)}"
            continue
        for bound, count in zip((*sample.bounds, math.inf), accumulate(sample.counts), strict=True):
            yield f"{family.name}_bucket{_labels([*own, ('le', _number(bound))])} {count}"
        yield f"{family.name}_sum{_labels(own)} {_number(sample.sum)}"
        yield f"{family.name}_count{_labels(own)} {sample.total}"


def _labels(labels: Sequence[tuple[str, str]]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return repr(value)
