"""Server-sent events out of a body that comes in pieces, cut anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Reads the `data` of events: several lines of one event are joined, comments and other fields are left out."""

    def __init__(self) -> None:
        self._rest = b""  # the line that has no end yet
        self._skip = False  # the last line ended with a carriage return: a line feed may still belong to it
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of the events that `piece` completes; one that the body ends in is none."""
        if self._skip and piece:
            piece, self._skip = piece.removeprefix(b"\n"), False
        text, begin = self._rest + piece, 0
        for end in LINE_END.finditer(text):
            line = text[begin : end.start()]
            begin = end.end()
            self._skip = end[0] == b"\r" and begin == len(text)
            if line:
                self._field(line)
            elif self._data:
                yield b"\n".join(self._data).decode("utf8", "replace")
                self._data = []
        self._rest = text[begin:]

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
