"""What the terminal can show: colours, width, and text that may hold anything."""

from __future__ import annotations

import os
import shutil
import textwrap
import unicodedata
from typing import TextIO

MAX_WIDTH = 100
_CODES = {"bold": "1", "dim": "2", "struck": "2;9", "good": "32", "bad": "31", "warn": "33", "title": "1;36"}
_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # of the direction of writing


class Style:
    """Colours by meaning; without colour the text comes back as it is."""

    def __init__(self, color: bool):
        self.color = color

    def __call__(self, kind: str, text: str) -> str:
        return f"\x1b[{_CODES[kind]}m{text}\x1b[0m" if self.color and text else text


def wants_color(choice: str, stream: TextIO) -> bool:
    """Whether to colour: "always", "never", or "auto", which asks the stream and the environment."""
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Columns to write, at most MAX_WIDTH."""
    return max(40, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))


def visible(text: str) -> str:
    """`text` with control characters as visible signs: a model's output must not steer the terminal."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(character) == "Cc" or character in _OVERRIDES:
        return "\ufffd"
    return character


def one_line(text: str, width: int) -> str:
    """`text` in one line of at most `width` characters, line ends shown as a sign."""
    text = visible(text).replace("\n", "\u23ce").replace("\t", " ")
    return text if len(text) <= width else text[: max(0, width - 1)] + "\u2026"


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """`text` in lines of at most `width`, each after `indent`; its own line ends are kept."""
    lines: list[str] = []
    for line in visible(text).expandtabs(4).split("\n"):
        lines += textwrap.wrap(line, max(10, width - len(indent)), replace_whitespace=False) or [""]
    return [indent + line for line in lines]
