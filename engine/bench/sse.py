"""Server-sent events out of a body that comes in pieces, cut anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

LINE_END = re.compile(rb"\r\n|\n|\r")
MOST = 16 << 20
"""Bytes of one event: more than any server has to say, and what one that never ends it may cost."""


class EventParser:
    """Reads the `data` of events: several lines of one event are joined, comments and other fields are left out."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # of the line that has no end yet
        self._held = 0  # bytes of the event so far
        self._skip = False  # the last line ended with a carriage return: a line feed may still belong to it
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of the events that `piece` completes; one that the body ends in is none. ValueError where an event
        has more than MOST bytes."""
        if self._skip and piece:
            piece, self._skip = piece.removeprefix(b"\n"), False
        begin = 0
        for end in LINE_END.finditer(piece):
            line = b"".join((*self._rest, piece[begin : end.start()]))
            self._hold(end.end() - begin)
            begin, self._rest = end.end(), []
            self._skip = end[0] == b"\r" and begin == len(piece)
            if line:
                self._field(line)
                continue
            self._held = 0
            if self._data:
                yield b"\n".join(self._data).decode("utf8", "replace")
                self._data = []
        self._hold(len(piece) - begin)
        self._rest.append(piece[begin:])

    def _hold(self, count: int) -> None:
        self._held += count
        if self._held > MOST:
            raise ValueError(f"an event has more than {MOST} bytes")

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
